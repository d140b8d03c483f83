"""What options of methods share.

Defaults are those of OpenUnlearning (locuslab/open-unlearning, December 2025) unless a field says otherwise; the
learning rates are for models of 1 B parameters and more, small models need larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import not_negative, require


class MethodConfig(Protocol):
    """Options of any method."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop."""


def peer_optimizer(lr: float) -> OptimizerConfig:
    """OpenUnlearning's: AdamW, weight decay 0.01, one warm-up epoch of ten, then linear decay."""
    return OptimizerConfig(lr=lr, weight_decay=0.01, warmup_fraction=0.1, decay="linear")


@dataclass(frozen=True, kw_only=True)
class OneLoopConfig:
    """What these methods share."""

    optimizer: OptimizerConfig = field(default_factory=lambda: peer_optimizer(1e-5))
    """The optimiser."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop (only the outer one is stepped)."""
        return self.optimizer, self.optimizer

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        self.optimizer.check(f"{section}.optimizer")


@dataclass(frozen=True, kw_only=True)
class WeightedConfig(OneLoopConfig):
    """forget_weight * forget loss + retain_weight * retain loss."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    retain_weight: float = 1.0
    """alpha, weight of the retain loss; 0: no retain pass at all."""
    retain_loss: Literal["nll", "kl"] = "nll"
    """nll: mean token NLL of retain answers; kl: KL(untouched model || model) at the tokens of retain answers."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "forget_weight", "retain_weight")
        require(self.forget_weight + self.retain_weight > 0, f"{section}.forget_weight", 0, "more, or retain_weight")
