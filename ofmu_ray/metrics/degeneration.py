"""Signs of a damaged generator in its output (see also `metrics.repetition`), and when they make a model degenerate.
Independent of forgetting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ofmu_ray.metrics.functions import FloatArray

MEASURES = {"repetition": "repetition", "empty": "empty answers", "ngram_variety": "n-gram variety"}
"""Sign of a damaged generator -> label. More of the first two, or less of the last, is worse."""

MARGIN = 0.05
"""Smaller differences in a measure do not count as degenerate, even if significant."""

Bounds = tuple[float, float, float]
"""A value and the bounds of its 95 % interval."""


@dataclass(frozen=True)
class SoundRange:
    """Measures of sound generations."""

    of: str
    """Their source: "retrained", else "target on holdout rows" or "target on retain rows"."""
    bounds: Mapping[str, Bounds]
    """By measure."""


def failed_measures(metrics: Mapping[str, Any], sound: SoundRange | None) -> tuple[str, ...] | None:
    """The measures in which a model's answers to forget prompts are worse than sound ones; None: unknown.

    `metrics`: plain numbers, `forget_repetition`, `forget_repetition_low` and so on. A measure is worse if it differs
    by more than `MARGIN` and the 95 % interval of the difference is on the wrong side of 0. That interval is built
    from those of the two values (MOVER: Zou and Donner 2008, https://doi.org/10.1002/sim.3095). A value outside the
    other's interval is not enough, as both are estimates; and 0.7 % against 0.3 % of repeated 4-grams can be
    significant but is harmless.
    """
    if sound is None:
        return None
    known, failed = False, []
    for name, (other, other_low, other_high) in sound.bounds.items():
        value, low, high = (metrics.get(f"forget_{name}{end}") for end in ("", "_low", "_high"))
        if value is None or low is None or high is None:
            continue
        known = True
        if name == "ngram_variety":
            worse = other - value > max(MARGIN, math.hypot(high - value, other - other_low))
        else:
            worse = value - other > max(MARGIN, math.hypot(value - low, other_high - other))
        if worse:
            failed.append(name)
    return tuple(failed) if known else None


def words(metrics: Mapping[str, Any], sound: SoundRange | None) -> str | None:
    """The verdict on a model's answers to forget prompts as a sentence; None: unknown."""
    failed = failed_measures(metrics, sound)
    if failed is None or sound is None:
        return None
    shown = [
        f"{MEASURES[name]} {metrics[f'forget_{name}']:.2f} ({sound.of} {sound.bounds[name][0]:.2f})"
        for name in failed or [name for name in MEASURES if name in sound.bounds]
        if metrics.get(f"forget_{name}") is not None
    ]
    return f"answers to forget prompts: {', '.join(shown)}: {'degenerate' if failed else 'not degenerate'}"


def ngram_entropy(tokens: Sequence[int]) -> float:
    """(H_2 + 2 H_3) / 3 in bits: what the editing literature reports as fluency; at least 0.

    H_n is the entropy of the text's n-gram frequencies (Zhang et al., arXiv 1809.05972), weighted over bigrams and
    trigrams as in ROME (Meng et al., arXiv 2202.05262, which counts words; these are the model's tokens). It measures
    variety, not quality, and is bounded by about the binary logarithm of the length: compare texts of similar length.
    A text without trigrams has H_3 = 0.
    """
    return (_entropy(tokens, 2) + 2.0 * _entropy(tokens, 3)) / 3.0


def ngram_variety(entropy: FloatArray, tokens: FloatArray) -> FloatArray:
    """N-gram entropy relative to the maximum for the number of tokens, in [0, 1]: 1 if no bigram and no trigram occurs
    twice, and for texts too short to have two of them. [rows], [rows] -> [rows]."""
    bigrams, trigrams = (np.log2(np.maximum(tokens - short, 1.0)) for short in (1, 2))
    largest = (bigrams + 2.0 * trigrams) / 3.0
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(largest > 0, np.round(entropy / largest, 12), 1.0)
    return np.where(np.isnan(entropy + tokens), np.nan, share)


def _entropy(tokens: Sequence[int], n: int) -> float:
    counts = Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())
