"""Plain fitting of a data set, one step a round: how target and retrained models come about (`ofmu train`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ofmu_ray.algorithm.schedules import warmup_then
from ofmu_ray.config import FinetuneConfig
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.methods.protocol import Batches, drawn


class Finetune:
    """Descends the mean loss of one batch per round, with the engine's outer optimiser."""

    name = "finetune"

    def __init__(self, config: FinetuneConfig, rounds: int):
        self.config, self.rounds = config, rounds
        self.rounds_done = 0

    def batches_per_round(self) -> dict[str, int]:
        return {"train": 1}

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One step on the next batch of `retain_batches`; `forget_batches` is not touched."""
        config = self.config
        warmup = math.ceil(config.warmup_fraction * self.rounds)
        factor = warmup_then(config.decay, self.rounds_done, self.rounds, warmup)
        engine.set_learning_rate("outer", config.optimizer.lr * factor)
        gradient, loss = engine.gradient(next(drawn(retain_batches, "train")), kind="retain")
        norm = engine.apply(gradient, "outer")
        self.rounds_done += 1
        return {"loss": loss, "gradient_norm": norm, "lr": config.optimizer.lr * factor}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds_done": self.rounds_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds_done = int(state["rounds_done"])
