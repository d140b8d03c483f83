"""Gradient ascent on the forget loss (Jang et al. 2023, arXiv 2210.01504)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import OneLoopConfig
from ofmu_ray.config.spaces import Space, rate


@dataclass(frozen=True, kw_only=True)
class GradientAscentConfig(OneLoopConfig):
    """Gradient ascent on the forget loss (Jang et al. 2023, arXiv 2210.01504); retain rows are not used."""


OPTIONS = GradientAscentConfig
SPACE = Space((rate("gradient_ascent.optimizer.lr"),))
