"""DualOptim+ (Zhong et al. 2026, arXiv 2605.21539) and DualOptim (Zhong et al. 2025, arXiv 2504.15827)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from ofmu_ray.config.method_options import WeightedConfig, peer_optimizer
from ofmu_ray.config.optimizers import OptimizerConfig, SharedBaseConfig
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class DualOptimConfig(WeightedConfig):
    """DualOptim+ (Zhong et al. 2026, arXiv 2605.21539): forget and retain steps in turn, an optimiser state each.

    Defaults are those of its TOFU configuration (CityU-MLO/DualOptimPlus, config/phi1-5_tofu.yaml).
    """

    optimizer: OptimizerConfig = field(default_factory=lambda: replace(peer_optimizer(1e-5), beta2=0.95))
    """The optimiser of the retain steps; that of the forget steps differs in its rate only. adamw."""
    forget_weight: float = 0.1
    """gamma, weight of the forget loss."""
    forget_lr_ratio: float = 1.0
    """Learning rate of the forget steps, as a multiple of optimizer.lr."""
    retain_steps: int = 5
    """Retain steps after each forget step."""
    forget_loss: Literal["entropy", "npo", "nll"] = "entropy"
    """entropy: KL(uniform || model) at forget answers' tokens (ME); npo: NPO's loss; nll: the negated NLL."""
    npo_beta: float = 0.1
    """Inverse temperature of the NPO loss."""
    shared_base: bool = True
    """Both states are what is left of a common one; false: DualOptim (arXiv 2504.15827), nothing in common."""
    base_beta1: float = 0.99
    """First-moment decay of the common state."""
    base_beta2: float = 0.999
    """Second-moment decay of the common state."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of forget (inner) and of retain steps (outer)."""
        if not self.shared_base:
            return self.optimizer, self.optimizer
        own = {name.name: getattr(self.optimizer, name.name) for name in fields(OptimizerConfig)}
        shared = SharedBaseConfig(**own, base_beta1=self.base_beta1, base_beta2=self.base_beta2)
        return shared, shared

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "forget_weight", "retain_weight", "forget_lr_ratio", "retain_steps", "npo_beta")
        for name in ("base_beta1", "base_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{section}.{name}", value, "at least 0 and less than 1")
        rule = self.optimizer.name
        require(rule == "adamw" or not self.shared_base, f"{section}.optimizer.name", rule, "adamw, or no shared_base")


OPTIONS = DualOptimConfig
SPACE = Space(
    (
        rate("dualoptim.optimizer.lr"),
        Knob(
            "dualoptim.forget_lr_ratio",
            LogUniform(0.3, 10.0),
            "half a decade below the authors' 1 to a decade above",
        ),
        Knob(
            "dualoptim.forget_weight",
            LogUniform(0.03, 1.0),
            "around the authors' 0.1, up to the 1 of their scripts",
        ),
    )
)
