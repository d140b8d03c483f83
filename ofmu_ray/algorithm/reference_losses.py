"""Losses that compare the model with the reference model, as pure functions; suffixes and (sum, count) as in `losses`.

`_d`: [width of the hidden states].
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ofmu_ray.algorithm.losses import LossParts, row_sums


def preferred_refusals(
    nll_r: torch.Tensor,
    reference_nll_r: torch.Tensor,
    refusal_nll_r: torch.Tensor,
    reference_refusal_nll_r: torch.Tensor,
    *,
    beta: float,
) -> LossParts:
    """-(2 / beta) log sigmoid(beta (gain of the refusal - gain of the answer)), gain = log p - log p_ref; mean of rows.

    DPO (Rafailov et al. 2023, arXiv 2305.18290) with the refusal as the preferred answer, sequence sums. The factor
    2 / beta is OpenUnlearning's, not DPO's: it makes the gradient comparable with NPO's.
    """
    gain_r = reference_refusal_nll_r - refusal_nll_r
    gain_r = gain_r - (reference_nll_r - nll_r)
    return -2 / beta * functional.logsigmoid(beta * gain_r).sum(), len(nll_r)


def distilled_from_adjusted(
    logits_tv: torch.Tensor, reference_logprobs_tv: torch.Tensor, labels_t: torch.Tensor, *, beta: float
) -> LossParts:
    """Cross-entropy to softmax(reference logits, minus beta at the true token); mean over answer tokens.

    UNDIAL (Dong et al. 2024, arXiv 2402.10052). Log-probabilities work as logits: softmax ignores a common offset.
    """
    reference_tv = reference_logprobs_tv.to(logits_tv.dtype)
    less_tv = torch.zeros_like(reference_tv).scatter_(1, labels_t[:, None], beta)
    target_tv = (reference_tv - less_tv).softmax(1)
    return functional.cross_entropy(logits_tv, target_tv, reduction="sum"), len(labels_t)


def misdirection(hidden_td: torch.Tensor, target_td: torch.Tensor, rows_t: torch.Tensor, rows: int) -> LossParts:
    """Mean squared distance between hidden states and target (which may be a single [width] vector); mean over rows.

    RMU (Li et al. 2024, arXiv 2403.03218). The mean over rows is that of S_i / n_i: S_i the sum over row i's tokens of
    the mean over the width, n_i their number. OpenUnlearning computes mean_i(S_i) mean_j(1 / n_j) instead, where
    [rows] / [rows, 1] broadcasts to [rows, rows].
    """
    squares_t = (hidden_td - target_td.to(hidden_td.dtype)).square().mean(1)
    sums_r = row_sums(squares_t, rows_t, rows)
    return (sums_r / torch.bincount(rows_t, minlength=rows)).sum(), rows
