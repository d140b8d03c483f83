"""What the methods with one loop share: a forget and a retain gradient, added up, one optimiser step a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch

from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.algorithm.space import Vector, add_, scale_
from ofmu_ray.config import OneLoopConfig
from ofmu_ray.engines.language import causal_lm_loss
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.methods.protocol import Batches, Need, drawn

C = TypeVar("C", bound=OneLoopConfig)
LossParts = tuple[torch.Tensor, torch.Tensor | int]
"""Sum of a micro-batch's losses and how many they are (rows or tokens): the engine divides by the global count."""


class OneLoop(Generic[C]):
    """theta <- step down (forget_weight grad L_f + retain_weight grad L_r); a weight of 0 saves the pass.

    A method overrides `forget_loss` (and `retain_loss`); the steps are those of the engine's outer optimiser.
    """

    name: str
    forget_weight: float = 1.0
    retain_weight: float = 0.0

    def __init__(self, config: C, rounds: int | None = None):
        self.config, self.rounds = config, rounds
        self.rounds_done = 0

    @property
    def needs(self) -> tuple[Need, ...]:
        return ()

    def freeze(self, module: torch.nn.Module) -> None:
        """Nothing: all weights are trained."""

    def start(self, engine: Engine) -> None:
        """Nothing to keep of the untouched weights."""

    def batches_per_round(self) -> dict[str, int]:
        return {"forget": int(self.forget_weight > 0), "retain": int(self.retain_weight > 0)}

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        """Loss on forget rows that is minimised."""
        raise AssertionError(f"{self.name} has no forget loss")

    def retain_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        """Loss on retain rows that is minimised: token-mean NLL."""
        return causal_lm_loss(module, micro)

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One update; draws `batches_per_round()` batches."""
        lr = learning_rate(self.config.optimizer, self.rounds_done, self.rounds)
        engine.set_learning_rate("outer", lr)
        figures: dict[str, float] = {"lr": lr}
        direction: Vector | None = None
        if self.forget_weight > 0:
            batch = next(drawn(forget_batches, "forget"))
            direction, figures["forget_loss"] = engine.gradient(batch, self.forget_loss, kind="forget")
            scale_(direction, self.forget_weight)
        if self.retain_weight > 0:
            batch = next(drawn(retain_batches, "retain"))
            g_r, figures["retain_loss"] = engine.gradient(batch, self.retain_loss, kind="retain")
            direction = (
                scale_(g_r, self.retain_weight) if direction is None else add_(direction, g_r, self.retain_weight)
            )
        assert direction is not None
        figures["gradient_norm"] = engine.apply(direction, "outer")
        self.rounds_done += 1
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {"rounds_done": self.rounds_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds_done = int(state["rounds_done"])
