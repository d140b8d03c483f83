"""Does an unlearned model stay unlearned? Relearning, quantisation and prompt-prefix attacks.

Each attack takes a causal language model (in eval mode; it is left bit-identical), a template and evaluation rows, and
returns a table with one line per row and condition. `curves` computes metrics from such tables; ofmu_ray.config
declares the options.
"""
