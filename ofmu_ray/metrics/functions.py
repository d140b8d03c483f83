"""The metrics as pure functions of per-row values (definitions: docs/metrics.md).

A row's raw values are mean token losses (natural log, EOS counted): `nll` of the right answer, `wrong_nll` of its wrong
answers. Arrays over rows are float64; ragged wrong answers are padded with NaN (`pad_ragged`). Nothing here depends on
a model, a file or a framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

METRIC_VERSION = 3
"""Part of every evaluation cache key: increment it when the meaning of a per-row value changes."""

_LARGEST_EXPONENT = 700.0  # exp() overflows float64 above; such ratios are clipped, their order does not matter


def pad_ragged(lists: Sequence[Sequence[float] | None]) -> FloatArray:
    """Lists of different lengths -> [rows, longest], padded with NaN (None: a row of NaN)."""
    width = max((len(values) for values in lists if values is not None), default=0)
    padded = np.full((len(lists), max(width, 1)), np.nan)
    for row, values in enumerate(lists):
        if values:
            padded[row, : len(values)] = values
    return padded


def probability(nll: ArrayLike) -> FloatArray:
    """exp(-nll): the answer's length-normalised probability, in (0, 1]. [rows] -> [rows]."""
    return np.exp(-np.asarray(nll, dtype=np.float64))


def options_probability(nll: ArrayLike, wrong_nll: ArrayLike) -> FloatArray:
    """P(right) / (P(right) + sum over wrong of P(wrong)), in (0, 1]. [rows], [rows, wrong] -> [rows].

    Computed from differences of losses, so it stays defined if every probability underflows. A row without wrong
    answers has no options to compare: NaN.
    """
    right = np.asarray(nll, dtype=np.float64)
    wrong = np.asarray(wrong_nll, dtype=np.float64)
    odds = np.exp(np.minimum(right[:, None] - wrong, _LARGEST_EXPONENT))
    return np.where(np.isnan(wrong).all(axis=1), np.nan, 1.0 / (1.0 + np.nansum(odds, axis=1)))


def truth_ratio(
    nll: ArrayLike, wrong_nll: ArrayLike, mean: Literal["geometric", "arithmetic"] = "geometric"
) -> FloatArray:
    """P(wrong) / P(right), with the mean over the wrong answers: below 1 the model prefers the right answer.

    `nll` is of the paraphrased answer on forget and retain, of the answer itself on real_authors and world_facts.
    geometric: exp(nll - mean_j wrong_nll_j), as in the TOFU release's logs and OpenUnlearning. arithmetic:
    mean_j exp(nll - wrong_nll_j), as in the TOFU release's evaluation during training; never below the geometric one.
    A row without wrong answers gives NaN. [rows], [rows, wrong] -> [rows].
    """
    difference: FloatArray = np.asarray(nll, dtype=np.float64)[:, None] - np.asarray(wrong_nll, dtype=np.float64)
    empty = np.asarray(np.isnan(difference).all(axis=1))
    difference = np.where(empty[:, None], 0.0, difference)
    if mean == "geometric":
        ratio = np.exp(np.clip(np.nanmean(difference, axis=1), -_LARGEST_EXPONENT, _LARGEST_EXPONENT))
    else:
        ratio = np.nanmean(np.exp(np.clip(difference, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)), axis=1)
    return np.where(empty, np.nan, ratio)


def closer_to_1(ratio: ArrayLike) -> FloatArray:
    """min(R, 1/R) per row, in [0, 1]: 1 if right and wrong answers are equally likely (forget truth ratio)."""
    values = np.asarray(ratio, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.minimum(values, 1.0 / values)


def true_better(ratio: ArrayLike) -> FloatArray:
    """max(0, 1 - R) per row, in [0, 1]: 1 if the wrong answers are impossible (truth ratio of the other sets)."""
    return np.maximum(0.0, 1.0 - np.asarray(ratio, dtype=np.float64))


def forget_quality(ratio: ArrayLike, retrained_ratio: ArrayLike) -> tuple[float, float]:
    """(p-value, statistic) of the two-sided Kolmogorov-Smirnov test between two models' truth ratios on forget rows.

    A large p-value: the model's ratios could be the retrained model's. The test depends only on the order of the
    values, so R and 1/R give the same result.
    """
    from scipy.stats import ks_2samp

    test = ks_2samp(np.asarray(ratio, dtype=np.float64), np.asarray(retrained_ratio, dtype=np.float64))
    return float(test.pvalue), float(test.statistic)


def exact_ks_p_value(statistic: float, n: int) -> float:
    """P(D >= statistic) of the two-sided Kolmogorov-Smirnov test between two samples of n values each.

    2 sum_j (-1)^(j-1) C(2n, n - jh) / C(2n, n) with h = n D (Gnedenko and Korolyuk, 1951): what `ks_2samp` computes for
    equal sizes, without its overhead, for the many resamples of an interval.
    """
    from scipy.special import gammaln

    distance = round(statistic * n)
    if distance == 0:
        return 1.0
    j = np.arange(1, n // distance + 1)
    terms = np.exp(2.0 * gammaln(n + 1) - gammaln(n - j * distance + 1) - gammaln(n + j * distance + 1))
    return float(np.clip(2.0 * np.sum(terms * np.where(j % 2, 1.0, -1.0)), 0.0, 1.0))


def counts_up_to(values: FloatArray, levels: FloatArray, weights: FloatArray) -> FloatArray:
    """Total weight of the values <= each level, in each draw. [rows], [levels], [draws, rows] -> [draws, levels]."""
    order = np.argsort(values, kind="stable")
    sums = np.zeros((len(weights), len(values) + 1))
    np.cumsum(weights[:, order], axis=1, out=sums[:, 1:])
    return sums[:, np.searchsorted(values[order], levels, side="right")]


def model_utility(components: ArrayLike) -> float | FloatArray:
    """Harmonic mean over the last axis of the nine numbers {probability, ROUGE-L recall, truth ratio} x {retain,
    real_authors, world_facts}, each in [0, 1]; 0 if any is 0. [..., 9] -> [...]."""
    values = np.asarray(components, dtype=np.float64)
    with np.errstate(divide="ignore"):
        mean = values.shape[-1] / np.sum(1.0 / values, axis=-1)
    return float(mean) if np.ndim(mean) == 0 else mean


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that repeat an earlier one, in [0, 1); 0 for a text shorter than n tokens."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
