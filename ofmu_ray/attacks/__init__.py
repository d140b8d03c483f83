"""Whether an unlearned model stays unlearned: relearning, quantisation and prompt-prefix attacks.

Each attack is a function of a causal language model (eval mode, which it leaves as it was, to the bit), a template and
evaluation rows, and returns a table with one line per row and condition. `curves` makes figures of such tables;
the options are ofmu_ray.config's.
"""
