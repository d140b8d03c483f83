"""Gradient difference (Liu et al. 2022, arXiv 2203.12817)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, Ranges, WeightedConfig
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class GradDiffConfig(WeightedConfig):
    """Gradient difference (Liu et al. 2022, arXiv 2203.12817): ascent on forget, descent on retain rows."""


class GradDiff(WeightedLoop[GradDiffConfig]):
    """Minimises -gamma L_f + alpha R: ascent on forget answers, descent on retain answers (R: NLL or KL)."""

    name = "grad_diff"
    options = GradDiffConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "retain_weight": RETAIN_WEIGHT,
    }

    @property
    def asks(self) -> frozenset[str]:
        return frozenset() if self.config.retain_loss == "nll" else super().asks

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return self.negated_loss(module, micro)
