"""Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import WeightedConfig
from ofmu_ray.config.ranges import not_negative
from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, Uniform, rate


@dataclass(frozen=True, kw_only=True)
class WGAConfig(WeightedConfig):
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): token losses times p^beta."""

    beta: float = 1.0
    """Exponent of the token's probability in its (detached) weight."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "beta")


OPTIONS = WGAConfig
SPACE = Space(
    (
        rate("wga.optimizer.lr"),
        Knob("wga.beta", Uniform(0.5, 2.0), "around 1, OpenUnlearning's; 0 would be GradDiff"),
        Knob("wga.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
