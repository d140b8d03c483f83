"""How much of an answer a model completes by itself, from its argmax predictions under teacher forcing.

Both measures leave the end-of-text token out: `matches` [n] says of each other token y_1..y_n of the answer whether the
model, given the prompt and y_<t, finds y_t the most likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def extraction_strength(matches: Sequence[bool]) -> float:
    """Share of the answer that the model completes from the rest, in [0, 1] (Carlini et al., arXiv 2012.07805).

    1 - k/n with the smallest k in 0..n such that every token after the k-th is matched: 1, nothing of the answer has to
    be given; 0, not even the last token follows from the others, or the answer has no token.
    """
    return _completed(matches) / len(matches) if matches else 0.0


def extraction_strength_with_floor(matches: Sequence[bool]) -> float:
    """The variant of OpenUnlearning, for comparison with its published numbers: never below 1/n.

    There k ends at n - 1, so that an answer of which nothing is matched scores 1/n, and a wrong one of one token 1.
    """
    return max(_completed(matches), 1) / len(matches) if matches else 0.0


def exact_memorisation(matches: Sequence[bool]) -> float:
    """Share of matched tokens, in [0, 1] (Tirumala et al., arXiv 2205.10770); NaN for an answer without tokens."""
    return sum(matches) / len(matches) if matches else math.nan


def _completed(matches: Sequence[bool]) -> int:
    """Length of the matched run at the end."""
    run = 0
    for matched in reversed(matches):
        if not matched:
            break
        run += 1
    return run
