"""Membership inference: can one tell from a model's losses which answers it was trained on?

Members are the forget rows, non-members the holdout rows. A score is oriented so that higher means less likely a
member. Scores from token values leave the end-of-text token out; those from the mean loss `nll` count it (which is
itself the score of the attack LOSS). The score of GradNorm takes a model: `gradient_norm.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ofmu_ray.metrics.functions import FloatArray, counts_up_to

MIN_K = 0.4
"""Share of an answer's tokens that Min-K and Min-K++ look at (OpenUnlearning's setting; the Min-K paper uses 0.2)."""
FALSE_POSITIVES = 0.01
_ROUNDING = 1e-12

# ------------------------------------------------------------------------------------------------------- scores


def zlib_score(nll: ArrayLike, compressed_bytes: ArrayLike) -> FloatArray:
    """Mean loss per byte of the compressed answer (Carlini et al., arXiv 2012.07805). [rows], [rows] -> [rows]."""
    return np.asarray(nll, dtype=np.float64) / np.asarray(compressed_bytes, dtype=np.float64)


def reference_score(nll: ArrayLike, reference_nll: ArrayLike) -> FloatArray:
    """Mean loss beyond that of a model which never saw the forget rows. [rows], [rows] -> [rows]."""
    return np.asarray(nll, dtype=np.float64) - np.asarray(reference_nll, dtype=np.float64)


def min_k(tokens: Sequence[float], share: float = MIN_K) -> float:
    """-mean of the max(1, floor(share n)) lowest of an answer's n token values; NaN without tokens.

    Of log-probabilities: Min-K (Shi et al., arXiv 2310.16789). Of their z-scores over the vocabulary: Min-K++ (Zhang et
    al., arXiv 2404.02936).
    """
    if not len(tokens):
        return math.nan
    return -float(np.mean(np.sort(np.asarray(tokens, dtype=np.float64))[: max(1, int(share * len(tokens)))]))


# ------------------------------------------------------------------------------------------------ how well they tell


def attack_auc(forget_scores: ArrayLike, holdout_scores: ArrayLike) -> float:
    """P(holdout score > forget score), ties counted half. [rows], [rows] -> [0, 1].

    1: the forget rows are the more likely ones (memorised); 0.5: no signal; below 0.5: less likely than rows that the
    model never saw (over-unlearned).
    """
    return float(area(*roc(forget_scores, holdout_scores))[0])


def tpr_at_fpr(forget_scores: ArrayLike, holdout_scores: ArrayLike, fpr: float = FALSE_POSITIVES) -> float:
    """Largest share of forget rows below a threshold that at most a share `fpr` of the holdout rows is below, [0, 1].

    Carlini et al., arXiv 2112.03570. Thresholds are scores, nothing is interpolated: with fewer than 1 / fpr holdout
    rows no false positive is allowed at all.
    """
    return float(best_rate(*roc(forget_scores, holdout_scores), fpr)[0])


def privleak(auc: ArrayLike, retrained_auc: ArrayLike) -> FloatArray:
    """100 (r - a) / (1 - r) of the AUC a on Min-K scores and the retrained model's, r (MUSE, Shi et al., 2407.06460).

    0: as the retrained model; negative: the forget rows still look like members (-100 at r = 0.5: fully); positive:
    they look less like members than to a model that never saw them. NaN where r = 1.
    """
    a, r = np.asarray(auc, dtype=np.float64), np.asarray(retrained_auc, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(r < 1.0, 100.0 * (r - a) / (1.0 - r), np.nan)


def roc(
    forget_scores: ArrayLike, holdout_scores: ArrayLike, weights: tuple[FloatArray, FloatArray] | None = None
) -> tuple[FloatArray, FloatArray]:
    """(false, true) positive rates at every threshold, from none to all positive. [rows], [rows] -> [draws, levels].

    `weights`: how often each forget and holdout row counts, [draws, rows] each; without them one draw of every row.
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
