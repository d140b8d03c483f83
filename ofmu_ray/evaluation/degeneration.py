"""Signs of a damaged generator in what it generates; apart from forgetting (see also `metrics.repetition`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def ngram_entropy(tokens: Sequence[int]) -> float:
    """(H_2 + 2 H_3) / 3 in bits: what the editing literature reports as fluency; at least 0.

    H_n is the entropy of the text's n-gram frequencies (Zhang et al., arXiv 1809.05972), weighted over bigrams and
    trigrams as in ROME (Meng et al., arXiv 2202.05262, which counts words; these are the model's tokens). It says how
    varied a text is, not how well it reads, and it is at most about the binary logarithm of the length: compare texts
    of similar lengths. A text without trigrams has H_3 = 0.
    """
    return (_entropy(tokens, 2) + 2.0 * _entropy(tokens, 3)) / 3.0


def _entropy(tokens: Sequence[int], n: int) -> float:
    counts = Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())
