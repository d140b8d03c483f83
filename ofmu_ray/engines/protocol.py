"""The engine's interface for methods, on top of the algorithm's parameter space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ofmu_ray.algorithm.space import Kind, Loop, ParameterSpace, Vector
from ofmu_ray.data.batch import Batch
from ofmu_ray.models.weights import Weights

__all__ = ["Batch", "Engine", "Kind", "Loop", "Loss", "PassAccount", "Vector"]

# loss_fn(module, batch) -> a scalar mean loss, or (sum of token losses, number of tokens) of one micro-batch.
Loss = Callable[[torch.nn.Module, Any], torch.Tensor | tuple[torch.Tensor, torch.Tensor | int]]


def sum_and_count(result: torch.Tensor | tuple[torch.Tensor, torch.Tensor | int]) -> tuple[torch.Tensor, Any]:
    """The result of a loss as a sum and the count to divide it by."""
    return result if isinstance(result, tuple) else (result, 1)


@dataclass
class PassAccount:
    """The cost of a run so far. One pass is one forward and backward over one global batch."""

    gradient_passes: dict[str, int] = field(default_factory=lambda: {"forget": 0, "retain": 0})
    tokens: int = 0
    """Tokens (padding excluded) that went through a forward and backward, over all ranks."""
    flops: float = 0.0
    """6 x parameters x tokens (forward 2, backward 4): the usual estimate, without attention."""
    updates: int = 0
    """Optimiser steps."""
    precisions: dict[str, int] = field(default_factory=dict)
    """Passes by the precision that they ran in. Those that enter a difference run in fp32, whatever model.precision."""

    def state(self) -> dict[str, Any]:
        return {
            "gradient_passes": dict(self.gradient_passes),
            "tokens": self.tokens,
            "flops": self.flops,
            "updates": self.updates,
            "precisions": dict(self.precisions),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.gradient_passes = dict(state["gradient_passes"])
        self.tokens, self.flops, self.updates = int(state["tokens"]), float(state["flops"]), int(state["updates"])
        self.precisions = dict(state.get("precisions", {}))


class Engine(ParameterSpace, Protocol):
    """One model, its parameters as sharded fp32 vectors, one optimiser per loop."""

    account: PassAccount
    loss_fn: Loss
    """The task's loss, the default of `gradient`."""
    kept: dict[str, Vector]
    """Vectors of the method, by name, that checkpoints have beside the weights. The method changes them in place."""
    precision: str

    @property
    def device(self) -> torch.device:
        """Device of the weights and batches."""

    def gradient(
        self,
        batch: Any,
        loss: Loss | None = None,
        *,
        kind: Kind = "forget",
        differenced: bool = False,
        work: float = 1.0,
    ) -> tuple[Vector, float]:
        """As in `ParameterSpace`; the mean is over all tokens of the global batch if the loss returns (sum, count).

        `batch` is a `Batch`, or one micro-batch as the loss takes it; `loss` defaults to `loss_fn`. `work`: share of
        the model's operations that the loss runs, for counting FLOPs.
        """

    def evaluate(self, batch: Any, fn: Callable[[torch.nn.Module, Any], Any]) -> list[Any]:
        """fn(module, micro-batch) for each micro-batch of this rank, without gradients. Collective with ZeRO-3."""

    def reading(self, *, autocast: bool = False) -> AbstractContextManager[torch.nn.Module]:
        """The model itself, for passes without gradients in the weights' own precision; with `autocast`,
        bf16_autocast runs them in bf16. Collective with ZeRO-3."""

    def weights(self) -> Vector:
        """A copy of theta (masters, this rank's shard)."""

    def set_learning_rate(self, loop: Loop, lr: float) -> None:
        """Learning rate of the loop's next steps."""

    def scale_learning_rates(self, factor: float) -> None:
        """From now on, every step uses `factor` times its learning rate, whoever sets that rate."""

    @property
    def layout(self) -> Mapping[str, Any]:
        """The layout of vectors on the ranks: what `ofmu_ray.engines.reshard` needs to reshard a saved state."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of weights and optimiser states, for `torch.save`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` bit for bit; UserError if workers or ZeRO stage differ."""

    def readable_weights(self) -> Weights:
        """The complete model, to be read on rank 0 tensor by tensor."""

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """The complete model on rank 0 (CPU), None on other ranks. Collective."""
