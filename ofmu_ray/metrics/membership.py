"""Membership inference: do a model's losses reveal which answers it was trained on?

Members are the forget rows, non-members the holdout rows. A higher score means less likely a member. Scores from
token values exclude the end-of-text token; those from the mean loss `nll` count it (`nll` itself is the score of the
attack LOSS). The score of GradNorm needs a model: `gradient_norm.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ofmu_ray.metrics.functions import FloatArray, counts_up_to

MIN_K = 0.4
"""Share of an answer's tokens that Min-K and Min-K++ use (OpenUnlearning's setting; the Min-K paper uses 0.2)."""
FALSE_POSITIVES = 0.01
_ROUNDING = 1e-12

# ------------------------------------------------------------------------------------------------------- scores


def zlib_score(nll: ArrayLike, compressed_bytes: ArrayLike) -> FloatArray:
    """Mean loss per byte of the compressed answer (Carlini et al., arXiv 2012.07805). [rows], [rows] -> [rows]."""
    return np.asarray(nll, dtype=np.float64) / np.asarray(compressed_bytes, dtype=np.float64)


def reference_score(nll: ArrayLike, reference_nll: ArrayLike) -> FloatArray:
    """Mean loss minus that of a model that never saw the forget rows. [rows], [rows] -> [rows]."""
    return np.asarray(nll, dtype=np.float64) - np.asarray(reference_nll, dtype=np.float64)


def min_k(tokens: Sequence[float], share: float = MIN_K) -> float:
    """-mean of the max(1, floor(share n)) lowest of an answer's n token values; NaN without tokens.

    On log-probabilities: Min-K (Shi et al., arXiv 2310.16789). On their z-scores over the vocabulary: Min-K++ (Zhang et
    al., arXiv 2404.02936).
    """
    if not len(tokens):
        return math.nan
    return -float(np.mean(np.sort(np.asarray(tokens, dtype=np.float64))[: max(1, int(share * len(tokens)))]))


# ---------------------------------------------------------------------------------------------------------- rates


def attack_auc(forget_scores: ArrayLike, holdout_scores: ArrayLike) -> float:
    """P(holdout score > forget score), ties counted half. [rows], [rows] -> [0, 1].

    1: forget rows are more likely (memorised); 0.5: no signal; below 0.5: less likely than rows that the model never
    saw (over-unlearned).
    """
    return float(area(*roc(forget_scores, holdout_scores))[0])


def tpr_at_fpr(forget_scores: ArrayLike, holdout_scores: ArrayLike, fpr: float = FALSE_POSITIVES) -> float:
    """True positive rate at a false positive rate of at most `fpr`, [0, 1] (Carlini et al., arXiv 2112.03570).

    Rows below the threshold are positive. Thresholds are scores, without interpolation: with fewer than 1 / fpr holdout
    rows no false positive is allowed.
    """
    return float(best_rate(*roc(forget_scores, holdout_scores), fpr)[0])


def privleak(auc: ArrayLike, retrained_auc: ArrayLike) -> FloatArray:
    """100 (r - a) / (1 - r), with the Min-K AUC a and the retrained model's r (MUSE, Shi et al., 2407.06460).

    0: like the retrained model; negative: forget rows still look like members (-100 at r = 0.5: fully); positive: they
    look less like members than to a model that never saw them. NaN if r = 1.
    """
    a, r = np.asarray(auc, dtype=np.float64), np.asarray(retrained_auc, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(r < 1.0, 100.0 * (r - a) / (1.0 - r), np.nan)


def roc(
    forget_scores: ArrayLike, holdout_scores: ArrayLike, weights: tuple[FloatArray, FloatArray] | None = None
) -> tuple[FloatArray, FloatArray]:
    """(false, true) positive rates at every threshold, from none to all positive. [rows], [rows] -> [draws, levels].

    `weights`: how often each forget and holdout row counts, [draws, rows] each; default: one draw of all rows.
    """
    forget, holdout = (np.asarray(scores, dtype=np.float64) for scores in (forget_scores, holdout_scores))
    members, others = weights or (np.ones((1, len(forget))), np.ones((1, len(holdout))))
    levels = np.concatenate([[-np.inf], np.unique(np.concatenate([forget, holdout]))])
    true, false = counts_up_to(forget, levels, members), counts_up_to(holdout, levels, others)
    return false / false[:, -1:], true / true[:, -1:]


def area(false: FloatArray, true: FloatArray) -> FloatArray:
    """Area under each curve of `roc`. [draws, levels] -> [draws]."""
    return np.asarray(np.trapezoid(true, false, axis=1))


def best_rate(false: FloatArray, true: FloatArray, fpr: float = FALSE_POSITIVES) -> FloatArray:
    """Largest true positive rate with a false positive rate of at most `fpr`. [draws, levels] -> [draws]."""
    return np.asarray(np.where(false <= fpr + _ROUNDING, true, 0.0).max(axis=1))
