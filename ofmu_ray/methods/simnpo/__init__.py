"""SimNPO: negative preference optimisation without a reference model (Fan et al. 2024, arXiv 2410.07163)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import WeightedConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.config.spaces import Knob, LogUniform, Space, Uniform, rate


@dataclass(frozen=True, kw_only=True)
class SimNPOConfig(WeightedConfig):
    """NPO without a reference model, on length-normalised losses (Fan et al. 2024, arXiv 2410.07163)."""

    forget_weight: float = 0.125
    """gamma, weight of the forget loss."""
    beta: float = 4.5
    """Inverse temperature."""
    delta: float = 0.0
    """Margin, subtracted from the mean token NLL."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta")


OPTIONS = SimNPOConfig
SPACE = Space(
    (
        rate("simnpo.optimizer.lr"),
        Knob("simnpo.beta", Uniform(2.0, 5.5), "around OpenUnlearning's 4.5"),
        Knob(
            "simnpo.forget_weight",
            LogUniform(0.06, 1.0),
            "from half of OpenUnlearning's 0.125 to the weight of the retain loss",
        ),
    )
)
