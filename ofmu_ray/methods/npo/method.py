"""Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts, negative_preference, row_sums, token_nll
from ofmu_ray.features.need import Need
from ofmu_ray.methods.npo import NPOConfig
from ofmu_ray.methods.one_loop import Weighted
from ofmu_ray.models.answers import answers


def answer_nll(module: torch.nn.Module, micro: Mapping[str, Any], prefix: str = "") -> torch.Tensor:
    """Sum of the token losses of each row's answer, [rows]."""
    logits_tv, labels_t, rows_t, rows = answers(module, micro, prefix=prefix)
    return row_sums(token_nll(logits_tv, labels_t), rows_t, rows)


def npo_loss(module: torch.nn.Module, micro: Mapping[str, Any], beta: float) -> LossParts:
    """`negative_preference` on a micro-batch with reference_nll."""
    nll_r = answer_nll(module, micro)
    return negative_preference(nll_r, micro["reference_nll"].to(nll_r.dtype), beta=beta)


class NPO(Weighted[NPOConfig]):
    """Minimises -gamma (2 / beta) mean_i log sigmoid(beta (NLL_i - NLL_i of the untouched model)) + alpha R."""

    name = "npo"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", "nll"), *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return npo_loss(module, micro, self.config.beta)


METHOD = NPO
