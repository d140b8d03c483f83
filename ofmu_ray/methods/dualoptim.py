"""DualOptim+ (Zhong et al. 2026, arXiv 2605.21539) and DualOptim (Zhong et al. 2025, arXiv 2504.15827)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.config.methods import MYPY, RATE, Ranges, WeightedConfig, peer_optimizer
from ofmu_ray.config.optimizers import OptimizerConfig, SharedBaseConfig
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.features.builtin import NLL
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.npo import npo_loss
from ofmu_ray.methods.one_loop import WeightedLoop
from ofmu_ray.methods.protocol import Batches, drawn

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts
    from ofmu_ray.engines.protocol import Engine


@dataclass(frozen=True, kw_only=True)
class DualOptimConfig(WeightedConfig):
    """DualOptim+ (Zhong et al. 2026, arXiv 2605.21539): forget and retain steps alternate, with separate states.

    Defaults are those of its TOFU configuration (CityU-MLO/DualOptimPlus, config/phi1-5_tofu.yaml).
    """

    optimizer: OptimizerConfig = field(default_factory=lambda: replace(peer_optimizer(), beta2=0.95))
    """The optimiser of the retain steps; that of the forget steps differs only in its learning rate. adamw."""
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
    """Both states are deltas from a shared base state; false: DualOptim (arXiv 2504.15827), no shared state."""
    base_beta1: float = 0.99
    """First-moment decay of the base state."""
    base_beta2: float = 0.999
    """Second-moment decay of the base state."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """For forget (inner) and retain steps (outer)."""
        if not self.shared_base:
            return self.optimizer, self.optimizer
        own = {name.name: getattr(self.optimizer, name.name) for name in fields(OptimizerConfig)}
        shared = SharedBaseConfig(**own, base_beta1=self.base_beta1, base_beta2=self.base_beta2)
        return shared, shared

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "forget_weight", "retain_weight", "forget_lr_ratio", "retain_steps", "npo_beta")
        for name in ("base_beta1", "base_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{section}.{name}", value, "at least 0 and less than 1")
        rule = self.optimizer.name
        require(rule == "adamw" or not self.shared_base, f"{section}.optimizer.name", rule, "adamw, or no shared_base")


class DualOptim(WeightedLoop[DualOptimConfig]):
    """A step down gamma grad L_f with the inner optimiser, then `retain_steps` down alpha grad R with the outer one.

    The optimisers keep the moments: `engines.optimizers.SharedBaseAdamW`, or two AdamW without `shared_base`.
    """

    name = "dualoptim"
    options = DualOptimConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "forget_lr_ratio": ("loguniform(0.3, 10)", "half a decade below the authors' 1 to a decade above"),
        "forget_weight": ("loguniform(0.03, 1)", "around the authors' 0.1, up to the 1 of their scripts"),
    }

    @property
    def needs(self) -> tuple[Need, ...]:
        own = (Need("forget", NLL),) if self.config.forget_loss == "npo" else ()
        return (*own, *super().needs)

    def batches_per_round(self) -> dict[str, int]:
        return {"forget": 1, "retain": self.config.retain_steps}

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.algorithm.losses import kl_from_uniform
        from ofmu_ray.models.answers import answers

        if self.config.forget_loss == "npo":
            return npo_loss(module, micro, self.config.npo_beta)
        if self.config.forget_loss == "nll":
            return self.negated_loss(module, micro)
        return kl_from_uniform(answers(module, micro).logits_tv)

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One forget step and all retain steps; `retain_loss` is their mean, `gradient_norm` is from the last."""
        from ofmu_ray.algorithm.space import scale_

        config = self.config
        lr = learning_rate(config.optimizer, self.rounds_done, self.rounds)
        engine.set_learning_rate("inner", config.forget_lr_ratio * lr)
        engine.set_learning_rate("outer", lr)
        gradient, forget_loss = engine.gradient(next(drawn(forget_batches, "forget")), self.forget_loss, kind="forget")
        values = {"lr": lr, "forget_lr": config.forget_lr_ratio * lr, "forget_loss": forget_loss}
        values["forget_gradient_norm"] = engine.apply(scale_(gradient, self.forget_weight), "inner")
        source, losses = drawn(retain_batches, "retain"), []
        for _ in range(config.retain_steps):
            gradient, loss = engine.gradient(next(source), self.retain_loss, kind="retain")
            losses.append(loss)
            values["gradient_norm"] = engine.apply(scale_(gradient, self.retain_weight), "outer")
        values["retain_loss"] = sum(losses) / len(losses)
        self.rounds_done += 1
        return values
