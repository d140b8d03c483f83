"""Task arithmetic: the negated task vector of a fit to the forget rows (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ofmu_ray.config.method_options import OneLoopConfig
from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(OneLoopConfig):
    """The negated task vector (Ilharco et al. 2023, arXiv 2212.04089): away from a fit to the forget rows."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """The optimiser of the fit (no weight decay: it would pull the unlearned weights, not the fitted ones)."""
    scale: float = 1.0
    """How far to go: the weights are theta_0 - scale (theta_fit - theta_0)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "scale")
        decay = self.optimizer.weight_decay
        require(decay == 0, f"{section}.optimizer.weight_decay", decay, "0 (it would not act on the fitted weights)")


OPTIONS = TaskArithmeticConfig
SPACE = Space(
    (
        rate("task_arithmetic.optimizer.lr"),
        Knob(
            "task_arithmetic.scale",
            LogUniform(0.3, 10.0),
            "up to 1 in the paper (arXiv 2212.04089); a short fit needs more",
        ),
    )
)
