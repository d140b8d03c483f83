"""UNDIAL: self-distillation from adjusted logits (Dong et al. 2024, arXiv 2402.10052)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ofmu_ray.config.method_options import WeightedConfig, peer_optimizer
from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.config.spaces import Choice, Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class UNDIALConfig(WeightedConfig):
    """Self-distillation from adjusted logits (Dong et al. 2024, arXiv 2402.10052)."""

    optimizer: OptimizerConfig = field(default_factory=lambda: peer_optimizer(1e-4))
    """The optimiser."""
    retain_weight: float = 0.0
    """alpha, weight of the retain loss; 0: no retain pass at all."""
    beta: float = 10.0
    """What is subtracted from the untouched model's logit of each answer token."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta")


OPTIONS = UNDIALConfig
SPACE = Space(
    (
        rate("undial.optimizer.lr", 10.0),
        Knob("undial.beta", LogUniform(3.0, 30.0), "half a decade around OpenUnlearning's 10"),
        Knob("undial.retain_weight", Choice((0.0, 1.0)), "OpenUnlearning's 0, and the weight of the other methods"),
    )
)
