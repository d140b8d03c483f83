"""Task arithmetic: the negated task vector of a fit to the forget rows (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

import torch

from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.algorithm.space import Vector, add_, scale_
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.methods.one_loop import OneLoop
from ofmu_ray.methods.protocol import Batches, drawn
from ofmu_ray.methods.task_arithmetic import TaskArithmeticConfig


class TaskArithmetic(OneLoop[TaskArithmeticConfig]):
    """theta = theta_0 - s (phi - theta_0), where phi descends L_f from theta_0.

    The engine's weights are theta, the unlearned model, after every round; phi is where gradients are taken:

        phi = theta_0 + (theta_0 - theta) / s = theta + (1 + 1/s) (theta_0 - theta),

    and its step phi <- phi - lr u(g) is theta <- theta + s lr u(g): a step down -g with s times the learning rate,
    exact for SGD and AdamW, whose update u is odd in g. Rounding of theta reaches phi (1 + 1/s) times as large.

    With LoRA the weights are what counts, theta_0 + B A, which is not linear in both factors: one of them is frozen at
    its random start and the other, 0 at first, is mirrored, so that the product of the fit is negated exactly.
    """

    name = "task_arithmetic"
    start_weights: Vector

    def freeze(self, module: torch.nn.Module) -> None:
        """Of each adapter, the factor that does not start at 0."""
        for name, parameter in module.named_parameters():
            if ".lora_A." in name or ".lora_embedding_B" in name:
                parameter.requires_grad_(False)

    def start(self, engine: Engine) -> None:
        """Keep theta_0 (one copy of this rank's share); a resumed run reads it from the untouched model again."""
        super().start(engine)
        self.start_weights = engine.weights()

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One step of the fit; `loss` and `gradient_norm` are the fit's, at phi. Draws one forget batch."""
        scale, batch = self.config.scale, next(drawn(forget_batches, "forget"))
        lr = learning_rate(self.config.optimizer, self.rounds_done, self.rounds)
        engine.set_learning_rate("outer", scale * lr)
        away = add_(engine.weights(), self.start_weights, -1.0)
        with engine.displaced(away, -(1 + 1 / scale)):
            gradient, loss = engine.gradient(batch, kind="forget")
        norm = engine.apply(scale_(gradient, -1.0), "outer")
        self.rounds_done += 1
        return {"lr": lr, "loss": loss, "gradient_norm": norm}


METHOD = TaskArithmetic
