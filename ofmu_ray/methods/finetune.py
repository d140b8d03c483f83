"""Plain fine-tuning on a data set, one step per round: makes target and retrained models (`ofmu train`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.config.methods import FinetuneConfig, Ranges
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.protocol import Batches, Method, drawn

if TYPE_CHECKING:
    import torch

    from ofmu_ray.engines.protocol import Engine


class Finetune(Method):
    """Descends the mean loss of one batch per round, with the engine's outer optimiser."""

    name = "finetune"
    options = FinetuneConfig
    space: ClassVar[Ranges] = {}
    unlearns = False
    asks: frozenset[str] = frozenset()
    notes: Sequence[str] = ()

    def __init__(self, config: FinetuneConfig, rounds: int | None = None):
        self.config, self.rounds = config, rounds
        self.rounds_done = 0

    @property
    def needs(self) -> tuple[Need, ...]:
        return ()

    def freeze(self, module: torch.nn.Module) -> None:
        """Nothing: all weights are trained."""

    def start(self, engine: Engine) -> None:
        """Nothing to save from the reference model."""

    def batches_per_round(self) -> dict[str, int]:
        return {"train": 1}

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One step on the next batch of `retain_batches`; `forget_batches` is not used."""
        lr = learning_rate(self.config.optimizer, self.rounds_done, self.rounds)
        engine.set_learning_rate("outer", lr)
        gradient, loss = engine.gradient(next(drawn(retain_batches, "train")), kind="retain")
        norm = engine.apply(gradient, "outer")
        self.rounds_done += 1
        return {"loss": loss, "gradient_norm": norm, "lr": lr}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds_done": self.rounds_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds_done = int(state["rounds_done"])
