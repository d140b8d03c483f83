"""Gradient difference (Liu et al. 2022, arXiv 2203.12817)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import WeightedConfig
from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class GradDiffConfig(WeightedConfig):
    """Gradient difference (Liu et al. 2022, arXiv 2203.12817): ascent on forget, descent on retain rows."""


OPTIONS = GradDiffConfig
SPACE = Space(
    (
        rate("grad_diff.optimizer.lr"),
        Knob("grad_diff.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
