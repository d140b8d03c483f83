"""Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import WeightedConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class NPOConfig(WeightedConfig):
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868)."""

    beta: float = 0.1
    """Inverse temperature; towards 0 it becomes gradient ascent."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta")


OPTIONS = NPOConfig
SPACE = Space(
    (
        rate("npo.optimizer.lr"),
        Knob(
            "npo.beta", LogUniform(0.03, 1.0), "0.1 in the paper (arXiv 2404.05868), which compares values from 0 to 1"
        ),
        Knob("npo.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
