"""SimNPO: negative preference optimisation without a reference model (Fan et al. 2024, arXiv 2410.07163)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts, row_sums, simple_negative_preference, token_nll
from ofmu_ray.config import SimNPOConfig
from ofmu_ray.methods.one_loop import Weighted
from ofmu_ray.models.answers import answers


def answer_sums(module: torch.nn.Module, micro: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the token losses of each row's answer and its number of tokens, [rows] each."""
    logits_tv, labels_t, rows_t, rows = answers(module, micro)
    nll_t = token_nll(logits_tv, labels_t)
    nll_r, tokens_r = (row_sums(values, rows_t, rows) for values in (nll_t, torch.ones_like(nll_t)))
    return nll_r, tokens_r


class SimNPO(Weighted[SimNPOConfig]):
    """Minimises gamma mean_i(-(2 / beta) log sigmoid(beta (NLL_i / T_i - delta))) + alpha R, mean over forget rows.

    NLL_i is the sum over the T_i tokens of the answer, its end included.
    """

    name = "simnpo"

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        nll_r, tokens_r = answer_sums(module, micro)
        return simple_negative_preference(nll_r, tokens_r, beta=self.config.beta, delta=self.config.delta)
