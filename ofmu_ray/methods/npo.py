"""Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, Ranges, WeightedConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.features.builtin import NLL
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class NPOConfig(WeightedConfig):
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868)."""

    beta: float = 0.1
    """Inverse temperature; towards 0 it becomes gradient ascent."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "beta")


def answer_nll(module: torch.nn.Module, micro: Mapping[str, Any], prefix: str = "") -> torch.Tensor:
    """Sum of the token losses of each row's answer, [rows]."""
    from ofmu_ray.algorithm.losses import row_sums, token_nll
    from ofmu_ray.models.answers import answers

    logits_tv, labels_t, rows_t, rows = answers(module, micro, prefix=prefix)
    return row_sums(token_nll(logits_tv, labels_t), rows_t, rows)


def npo_loss(module: torch.nn.Module, micro: Mapping[str, Any], beta: float) -> LossParts:
    """`negative_preference` on a micro-batch with reference_nll."""
    from ofmu_ray.algorithm.losses import negative_preference

    nll_r = answer_nll(module, micro)
    return negative_preference(nll_r, micro["reference_nll"].to(nll_r.dtype), beta=beta)


class NPO(WeightedLoop[NPOConfig]):
    """Minimises -gamma (2 / beta) mean_i log sigmoid(beta (NLL_i - NLL_i of the reference model)) + alpha R."""

    name = "npo"
    options = NPOConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "beta": ("loguniform(0.03, 1)", "0.1 in the paper (arXiv 2404.05868), which compares values from 0 to 1"),
        "retain_weight": RETAIN_WEIGHT,
    }

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", NLL), *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return npo_loss(module, micro, self.config.beta)
