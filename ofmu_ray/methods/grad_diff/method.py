"""Gradient difference (Liu et al. 2022, arXiv 2203.12817)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts
from ofmu_ray.methods.grad_diff import GradDiffConfig
from ofmu_ray.methods.one_loop import Weighted


class GradDiff(Weighted[GradDiffConfig]):
    """Minimises -gamma L_f + alpha R: ascent on forget answers, descent on retain answers (R: NLL or KL)."""

    name = "grad_diff"

    @property
    def asks(self) -> frozenset[str]:
        return frozenset() if self.config.retain_loss == "nll" else super().asks

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return self.negated_loss(module, micro)


METHOD = GradDiff
