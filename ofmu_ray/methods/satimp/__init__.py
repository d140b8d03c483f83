"""SatImp: saturation and importance weights (Yang et al. 2025, arXiv 2505.11953)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import WeightedConfig
from ofmu_ray.config.ranges import not_negative
from ofmu_ray.config.spaces import Knob, LogUniform, Space, Uniform, rate


@dataclass(frozen=True, kw_only=True)
class SatImpConfig(WeightedConfig):
    """Saturation and importance weights (Yang et al. 2025, arXiv 2505.11953): token losses times p^b1 (1 - p)^b2."""

    forget_weight: float = 0.1
    """gamma, weight of the forget loss."""
    beta1: float = 5.0
    """Exponent of p (saturation)."""
    beta2: float = 1.0
    """Exponent of 1 - p (importance)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "beta1", "beta2")


OPTIONS = SatImpConfig
SPACE = Space(
    (
        rate("satimp.optimizer.lr"),
        Knob("satimp.forget_weight", LogUniform(0.03, 1.0), "OpenUnlearning's 0.1 up to the 1 of its documentation"),
        Knob("satimp.beta1", Uniform(3.0, 6.0), "around OpenUnlearning's 5"),
        Knob("satimp.beta2", Uniform(0.5, 2.0), "around OpenUnlearning's 1"),
    )
)
