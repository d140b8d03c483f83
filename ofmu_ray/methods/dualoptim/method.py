"""DualOptim+ (Zhong et al. 2026, arXiv 2605.21539) and DualOptim (Zhong et al. 2025, arXiv 2504.15827)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts, kl_from_uniform
from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.algorithm.space import scale_
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.features.need import Need
from ofmu_ray.methods.dualoptim import DualOptimConfig
from ofmu_ray.methods.npo.method import npo_loss
from ofmu_ray.methods.one_loop import Weighted
from ofmu_ray.methods.protocol import Batches, drawn
from ofmu_ray.models.answers import answers


class DualOptim(Weighted[DualOptimConfig]):
    """A step down gamma grad L_f with the inner optimiser, then `retain_steps` down alpha grad R with the outer one.

    The moments are the optimisers' own: `engines.optimizers.SharedBaseAdamW`, or without `shared_base` two AdamW.
    """

    name = "dualoptim"

    @property
    def needs(self) -> tuple[Need, ...]:
        own = (Need("forget", "nll"),) if self.config.forget_loss == "npo" else ()
        return (*own, *super().needs)

    def batches_per_round(self) -> dict[str, int]:
        return {"forget": 1, "retain": self.config.retain_steps}

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        if self.config.forget_loss == "npo":
            return npo_loss(module, micro, self.config.npo_beta)
        if self.config.forget_loss == "nll":
            return self.negated_loss(module, micro)
        return kl_from_uniform(answers(module, micro).logits_tv)

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One forget step and all retain steps; `retain_loss` is the mean of theirs, `gradient_norm` the last one's."""
        config = self.config
        lr = learning_rate(config.optimizer, self.rounds_done, self.rounds)
        engine.set_learning_rate("inner", config.forget_lr_ratio * lr)
        engine.set_learning_rate("outer", lr)
        gradient, forget_loss = engine.gradient(next(drawn(forget_batches, "forget")), self.forget_loss, kind="forget")
        figures = {"lr": lr, "forget_lr": config.forget_lr_ratio * lr, "forget_loss": forget_loss}
        figures["forget_gradient_norm"] = engine.apply(scale_(gradient, self.forget_weight), "inner")
        source, losses = drawn(retain_batches, "retain"), []
        for _ in range(config.retain_steps):
            gradient, loss = engine.gradient(next(source), self.retain_loss, kind="retain")
            losses.append(loss)
            figures["gradient_norm"] = engine.apply(scale_(gradient, self.retain_weight), "outer")
        figures["retain_loss"] = sum(losses) / len(losses)
        self.rounds_done += 1
        return figures


METHOD = DualOptim
