"""Losses of the unlearning methods as pure functions: log-probabilities in, sum and count out.

Suffixes name the axes: `_tv` [labelled tokens, vocabulary], `_t` [labelled tokens], `_r` [rows]. Each loss returns
(sum, count). The caller adds up micro-batches and workers and divides by the global count, so the mean over tokens or
rows does not depend on how the batch is split. All losses are minimised and in nats.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

LossParts = tuple[torch.Tensor, torch.Tensor | int]
"""Sum of a micro-batch's losses and their number (rows or tokens)."""


MATCHED = 0.1
"""Rows whose mean loss is within this share of the level are at it (unseen rows of TOFU: sd of twice as much)."""


def token_nll(logits_tv: torch.Tensor, labels_t: torch.Tensor) -> torch.Tensor:
    """-log p of each labelled token, [labelled tokens]."""
    return functional.cross_entropy(logits_tv, labels_t, reduction="none")


def row_sums(values_t: torch.Tensor, rows_t: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum of the token values in each of `rows` rows; `rows_t` is the row of each token."""
    return values_t.new_zeros(rows).index_add(0, rows_t, values_t)


def bounded_tokens(nll_t: torch.Tensor, *, level: float) -> tuple[torch.Tensor, int]:
    """min(nll, level) of each token; mean over tokens. A token above the level has no gradient."""
    return nll_t.clamp(max=level).sum(), len(nll_t)


def bounded_rows(nll_r: torch.Tensor, tokens_r: torch.Tensor, *, level: float) -> LossParts:
    """tokens x min(nll / tokens, level) of each row, where `nll_r` is its sum; mean over tokens. A row whose mean token
    loss is above the level has no gradient."""
    return torch.minimum(nll_r, level * tokens_r).sum(), tokens_r.sum()


def capped(level: float) -> float:
    """How far a token counts in `matched_rows`: twice the level, or 3 nats more where that is further. In answers that
    repeat the question most tokens are certain and a few are not, so their level is low."""
    return max(2 * level, level + 3)


def matched_rows(nll_t: torch.Tensor, rows_t: torch.Tensor, rows: int, *, level: float) -> LossParts:
    """tokens x (level - distance) of each of `rows` rows, where distance = max(0, |mean - level| - MATCHED x level) and
    mean is that of min(nll, `capped(level)`); less what tokens have beyond twice that. Mean over tokens.

    Ascent raises rows below the level, lowers rows beyond it, and leaves rows near it. Tokens far beyond it do not
    count: they would take all of a row's loss. What raises other tokens drives them still further; then they are
    lowered.
    """
    most = capped(level)
    nll_r, tokens_r = (row_sums(values, rows_t, rows) for values in (nll_t.clamp(max=most), torch.ones_like(nll_t)))
    level_r, far_t = level * tokens_r, (nll_t - 2 * most).clamp(min=0)
    apart_r = ((nll_r - level_r).abs() - MATCHED * level_r).clamp(min=0)
    return (level_r - apart_r).sum() - far_t.sum(), tokens_r.sum()


def weighted_ascent(
    nll_t: torch.Tensor, *, saturation: float = 0.0, importance: float = 0.0
) -> tuple[torch.Tensor, int]:
    """- p^saturation (1 - p)^importance nll, p = exp(-nll), with a detached weight; mean over tokens.

    saturation 1: WGA, weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301). Both: SatImp (Yang et al. 2025,
    arXiv 2505.11953). Neither: gradient ascent.
    """
    p_t = torch.exp(-nll_t.detach())
    weight_t = p_t**saturation * (1 - p_t) ** importance
    return -(weight_t * nll_t).sum(), len(nll_t)


def negative_preference(nll_r: torch.Tensor, reference_nll_r: torch.Tensor, *, beta: float) -> tuple[torch.Tensor, int]:
    """-(2 / beta) log sigmoid(beta (nll - reference nll)), sequence sums; mean over rows.

    NPO (Zhang et al. 2024, arXiv 2404.05868). As beta goes to 0: gradient ascent, up to a constant.
    """
    return -2 / beta * functional.logsigmoid(beta * (nll_r - reference_nll_r)).sum(), len(nll_r)


def simple_negative_preference(
    nll_r: torch.Tensor, tokens_r: torch.Tensor, *, beta: float, delta: float
) -> tuple[torch.Tensor, int]:
    """-(2 / beta) log sigmoid(beta (nll / tokens - delta)); mean over rows.

    SimNPO (Fan et al. 2024, arXiv 2410.07163): NPO without a reference model, on length-normalised losses.
    """
    return -2 / beta * functional.logsigmoid(beta * (nll_r / tokens_r - delta)).sum(), len(nll_r)


def distilled_without_truth(logits_tv: torch.Tensor, labels_t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cross-entropy to the model's own (detached) distribution without the true token; mean over tokens.

    CE-U (Yang 2025, arXiv 2503.01224): the target is the softmax of the detached logits with the true one at -infinity.
    """
    target_tv = logits_tv.detach().scatter(1, labels_t[:, None], -torch.inf).softmax(1)
    return functional.cross_entropy(logits_tv, target_tv, reduction="sum"), len(labels_t)


def logit_margin(logits_tv: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(largest logit - mean logit)^2; mean over tokens. 0 for a uniform distribution.

    The forget loss of PDU (Entesari et al. 2025, arXiv 2506.05314).
    """
    return (logits_tv.amax(1) - logits_tv.mean(1)).square().sum(), len(logits_tv)


def kl_from_uniform(logits_tv: torch.Tensor) -> tuple[torch.Tensor, int]:
    """KL(uniform || model) of the next-token distributions; mean over tokens.

    ME, "maximise entropy" (Yuan et al. 2024, arXiv 2410.08109).
    """
    return -(logits_tv.log_softmax(1).mean(1) + math.log(logits_tv.shape[1])).sum(), len(logits_tv)


def kl_from_reference(logits_tv: torch.Tensor, reference_logprobs_tv: torch.Tensor) -> tuple[torch.Tensor, int]:
    """KL(reference || model) of the next-token distributions; mean over tokens."""
    reference_tv = reference_logprobs_tv.to(logits_tv.dtype)
    logprobs_tv = logits_tv.log_softmax(1)
    return functional.kl_div(logprobs_tv, reference_tv, reduction="sum", log_target=True), len(logits_tv)
