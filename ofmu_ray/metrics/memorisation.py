"""How much of an answer a model completes on its own, from its argmax predictions under teacher forcing.

Both measures exclude the end-of-text token: `matches` [n] tells for each other answer token y_1..y_n whether the model
predicts y_t as most likely, given the prompt and y_<t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def extraction_strength(matches: Sequence[bool]) -> float:
    """Share of the answer that the model completes from the rest, in [0, 1] (Carlini et al., arXiv 2012.07805).

    1 - k/n with the smallest k in 0..n such that all tokens after the k-th match: 1 if the model needs no part of the
    answer; 0 if it misses even the last token, or if the answer has no token.
    """
    return _completed(matches) / len(matches) if matches else 0.0


def extraction_strength_with_floor(matches: Sequence[bool]) -> float:
    """OpenUnlearning's variant, to compare with its published numbers: never below 1/n.

    There k ends at n - 1: an answer without any match scores 1/n, and a wrong answer of one token 1.
    """
    return max(_completed(matches), 1) / len(matches) if matches else 0.0


def exact_memorisation(matches: Sequence[bool]) -> float:
    """Share of matching tokens, in [0, 1] (Tirumala et al., arXiv 2205.10770); NaN for an answer without tokens."""
    return sum(matches) / len(matches) if matches else math.nan


def _completed(matches: Sequence[bool]) -> int:
    """Length of the run of matches at the end."""
    run = 0
    for matched in reversed(matches):
        if not matched:
            break
        run += 1
    return run
