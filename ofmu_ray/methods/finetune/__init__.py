"""Plain fitting of a data set, by `ofmu train`: no unlearning method, as it has no search space."""

from __future__ import annotations

from dataclasses import dataclass, field

from ofmu_ray.config.optimizers import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Plain fitting of a data set (`ofmu train`)."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-3, weight_decay=0.01, warmup_fraction=0.05, decay="cosine")
    )
    """Optimiser of the fit."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop (only the outer one is stepped)."""
        return self.optimizer, self.optimizer

    def __post_init__(self) -> None:
        self.optimizer.check("finetune.optimizer")


OPTIONS = FinetuneConfig
