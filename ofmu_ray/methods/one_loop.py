"""Base of the one-loop methods: a weighted sum of forget and retain gradient, one optimiser step per round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ofmu_ray.algorithm.schedules import learning_rate
from ofmu_ray.config.methods import OneLoopConfig, WeightedConfig
from ofmu_ray.features.builtin import LOG_PROBABILITIES
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.protocol import Batches, Method, drawn

if TYPE_CHECKING:
    import torch

    from ofmu_ray.algorithm.losses import LossParts
    from ofmu_ray.algorithm.space import Vector
    from ofmu_ray.engines.protocol import Engine, Loss

__all__ = ["LossParts", "OneLoop", "WeightedLoop"]

C = TypeVar("C", bound=OneLoopConfig)
W = TypeVar("W", bound=WeightedConfig)


class OneLoop(Method, Generic[C]):
    """theta <- step down (forget_weight grad L_f + retain_weight grad L_r); a weight of 0 saves the pass.

    A method overrides `forget_loss` (and `retain_loss`, or `direction`); the engine's outer
    optimiser makes the steps.
    """

    forget_weight: float = 1.0
    retain_weight: float = 0.0
    notes: Sequence[str] = ()
    work: float = 1.0
    """Share of the model's operations that the losses run."""

    def __init__(self, config: C, rounds: int | None = None):
        from ofmu_ray.models.answers import causal_lm_loss

        self.config, self.rounds = config, rounds
        self.rounds_done = 0
        self.own_loss: Loss = causal_lm_loss
        """The engine's after `start`."""

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"answers"})

    @property
    def needs(self) -> tuple[Need, ...]:
        return ()

    def freeze(self, module: torch.nn.Module) -> None:
        """Nothing: all weights are trained."""

    def start(self, engine: Engine) -> None:
        self.own_loss = engine.loss_fn

    def batches_per_round(self) -> dict[str, int]:
        return {"forget": int(self.forget_weight > 0), "retain": int(self.retain_weight > 0)}

    def forget_batch(self, batch: Any) -> Any:
        """A forget batch as its loss sees it. Drop what the loss does not run, or its cost is counted."""
        return batch

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        """Loss on forget rows that is minimised."""
        raise AssertionError(f"{self.name} has no forget loss")

    def retain_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        """Loss on retain rows that is minimised: the engine's loss, the token-mean NLL for language models."""
        from ofmu_ray.engines.protocol import sum_and_count

        return sum_and_count(self.own_loss(module, micro))

    def negated_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        """The negated engine loss, as gradient ascent minimises it."""
        from ofmu_ray.engines.protocol import sum_and_count

        total, count = sum_and_count(self.own_loss(module, micro))
        return -total, count

    def direction(
        self, engine: Engine, forget: Vector | None, retain: Vector | None, series: dict[str, float]
    ) -> Vector:
        """The direction to descend, from both gradients (may overwrite them); may add to the round's `series`."""
        from ofmu_ray.algorithm.space import add_, scale_

        total = None if forget is None else scale_(forget, self.forget_weight)
        if retain is not None:
            total = scale_(retain, self.retain_weight) if total is None else add_(total, retain, self.retain_weight)
        assert total is not None
        return total

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One update from `batches_per_round()` batches."""
        lr = learning_rate(self.config.optimizer, self.rounds_done, self.rounds)
        engine.set_learning_rate("outer", lr)
        values: dict[str, float] = {"lr": lr}
        forget = retain = None
        counts = self.batches_per_round()
        if counts["forget"]:
            batch = self.forget_batch(next(drawn(forget_batches, "forget")))
            forget, values["forget_loss"] = engine.gradient(batch, self.forget_loss, kind="forget", work=self.work)
        if counts["retain"]:
            batch = next(drawn(retain_batches, "retain"))
            retain, values["retain_loss"] = engine.gradient(batch, self.retain_loss, kind="retain", work=self.work)
        values["gradient_norm"] = engine.apply(self.direction(engine, forget, retain, values), "outer")
        self.rounds_done += 1
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"rounds_done": self.rounds_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds_done = int(state["rounds_done"])


class WeightedLoop(OneLoop[W]):
    """A one-loop method whose weights and retain loss are options.

    retain_loss kl: KL(reference model || model) at the tokens of retain answers, mean over tokens. (OpenUnlearning
    takes it at every position, prompts and padding included, so its value depends on the batching.)
    """

    def __init__(self, config: W, rounds: int | None = None):
        super().__init__(config, rounds)
        self.forget_weight, self.retain_weight = config.forget_weight, config.retain_weight

    @property
    def needs(self) -> tuple[Need, ...]:
        kl = self.retain_weight > 0 and self.config.retain_loss == "kl"
        return (Need("retain", LOG_PROBABILITIES),) if kl else ()

    def retain_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.algorithm.losses import kl_from_reference
        from ofmu_ray.models.answers import answers

        if self.config.retain_loss == "nll":
            return super().retain_loss(module, micro)
        return kl_from_reference(answers(module, micro).logits_tv, micro["reference_logprobs"])
