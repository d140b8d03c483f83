"""Gradient ascent on the forget loss (Jang et al. 2023, arXiv 2210.01504)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts
from ofmu_ray.methods.gradient_ascent import GradientAscentConfig
from ofmu_ray.methods.one_loop import OneLoop


class GradientAscent(OneLoop[GradientAscentConfig]):
    """Minimises -L_f, the negated token-mean NLL of forget answers."""

    name = "gradient_ascent"
    asks = frozenset()

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return self.negated_loss(module, micro)


METHOD = GradientAscent
