"""Gradient ascent on the forget loss (Jang et al. 2023, arXiv 2210.01504)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, OneLoopConfig, Ranges
from ofmu_ray.methods.one_loop import OneLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class GradientAscentConfig(OneLoopConfig):
    """Gradient ascent on the forget loss (Jang et al. 2023, arXiv 2210.01504); retain rows are not used."""


class GradientAscent(OneLoop[GradientAscentConfig]):
    """Minimises -L_f, the negated token-mean NLL of forget answers."""

    name = "gradient_ascent"
    options = GradientAscentConfig
    space: ClassVar[Ranges] = {"optimizer.lr": RATE}
    asks = frozenset()

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return self.negated_loss(module, micro)
