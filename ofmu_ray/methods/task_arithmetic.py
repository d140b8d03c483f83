"""Task arithmetic: the negated task vector of a fit to the forget rows (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.config.methods import MYPY, RATE, OneLoopConfig, Ranges
from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.methods.one_loop import OneLoop
from ofmu_ray.methods.protocol import Batches, drawn

if MYPY:
    import torch

    from ofmu_ray.algorithm.space import Vector
    from ofmu_ray.engines.protocol import Engine


@dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(OneLoopConfig):
    """The negated task vector (Ilharco et al. 2023, arXiv 2212.04089): away from a fit to the forget rows."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser of the fit (no weight decay: it would act on the unlearned weights, not the fitted ones)."""
    scale: float = 1.0
    """Scale of the task vector: the weights are theta_0 - scale (theta_fit - theta_0)."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "scale")
        decay = self.optimizer.weight_decay
        require(decay == 0, f"{section}.optimizer.weight_decay", decay, "0 (it would not act on the fitted weights)")


class TaskArithmetic(OneLoop[TaskArithmeticConfig]):
    """theta = theta_0 - s (phi - theta_0), where phi descends L_f from theta_0.

    The engine's weights are theta, the unlearned model, after every round; phi is where gradients are taken:

        phi = theta_0 + (theta_0 - theta) / s = theta + (1 + 1/s) (theta_0 - theta),

    and its step phi <- phi - lr u(g) is theta <- theta + s lr u(g): a step down -g with s times the learning rate,
    exact for SGD and AdamW, whose update u is odd in g. Rounding errors of theta are (1 + 1/s) times as large in phi.

    With LoRA the weights are theta_0 + B A, which is not linear in both factors: one factor is frozen at its random
    start, and the other, initially 0, is mirrored, so the fit's product is negated exactly.
    """

    name = "task_arithmetic"
    options = TaskArithmeticConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "scale": ("loguniform(0.3, 10)", "up to 1 in the paper (arXiv 2212.04089); a short fit needs more"),
    }
    start_weights: Vector

    def freeze(self, module: torch.nn.Module) -> None:
        """Freeze the factor of each adapter that does not start at 0."""
        for name, parameter in module.named_parameters():
            if ".lora_A." in name or ".lora_embedding_B" in name:
                parameter.requires_grad_(False)

    def start(self, engine: Engine) -> None:
        """Save theta_0 (one copy of this rank's shard); a resumed run reads it from the reference model again."""
        super().start(engine)
        self.start_weights = engine.weights()

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One step of the fit; `loss` and `gradient_norm` are the fit's, at phi. Draws one forget batch."""
        from ofmu_ray.algorithm.space import add_, scale_

        scale, batch = self.config.scale, next(drawn(forget_batches, "forget"))
        lr = learning_rate(self.config.optimizer, self.rounds_done, self.rounds)
        engine.set_learning_rate("outer", scale * lr)
        away = add_(engine.weights(), self.start_weights, -1.0)
        with engine.displaced(away, -(1 + 1 / scale)):
            gradient, loss = engine.gradient(batch, kind="forget")
        norm = engine.apply(scale_(gradient, -1.0), "outer")
        self.rounds_done += 1
        return {"lr": lr, "loss": loss, "gradient_norm": norm}
