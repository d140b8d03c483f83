"""torch.compile for the passes of training: an option that falls back to eager passes, and says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self

import torch

from ofmu_ray.config import TrainingConfig
from ofmu_ray.engines.layers import decoder_layers
from ofmu_ray.models.answers import unwrapped

BACKEND: Any = "inductor"
"""torch's default."""


class CompiledLayers:
    """Within the context, the forward passes of a model's decoder layers (of another model: all of it) are compiled.

    Only their `forward` is replaced, so names, parameters and hooks stay as they are. Outside of the context passes are
    eager: an evaluation gives the same numbers with and without the option. If something does not compile, passes are
    eager from there on.
    """

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._on, self._failed = False, False

    def replace(self, module: torch.nn.Module) -> None:
        """Replace `forward` of the module's parts, before an engine is built on it."""
        try:
            parts: list[Any] = list(decoder_layers(module))
        except (AttributeError, AssertionError):  # no language model
            parts = [unwrapped(module)]
        for part in parts:
            part.forward = self._chosen(part.forward)

    def _chosen(self, eager: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException
        from torch._functorch import config

        # lengths differ between batches: with static shapes, every new one would be compiled
        compiled = torch.compile(eager, backend=BACKEND, dynamic=True)

        @functools.wraps(eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._on and not self._failed:
                try:
                    # also the backward pass is compiled here: what fails in the backward pass itself ends the run
                    with config.patch(force_non_lazy_backward_lowering=True):
                        return compiled(*args, **kwargs)
                except TorchDynamoException as error:  # no compiler, or code that it does not take
                    self.note(_line(error))
                    self._failed = True
            return eager(*args, **kwargs)

        return forward

    def __enter__(self) -> Self:
        self._on = True
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False

    def note(self, reason: str) -> None:
        """Say why passes are eager."""
        self._notes.append(f"training.compile: {reason}; passes are eager")

    def new_notes(self) -> list[str]:
        """The notes since the last call."""
        notes, self._notes = self._notes, []
        return notes


def compiled_passes(module: torch.nn.Module, training: TrainingConfig) -> CompiledLayers | None:
    """What compiles the module's passes if training.compile asks for it."""
    if not training.compile:
        return None
    compiled = CompiledLayers()
    if not training.single and training.zero_stage == 3:
        compiled.note("ZeRO-3 gathers weights between the operations of a layer")
    else:
        compiled.replace(module)
    return compiled


def _line(error: BaseException) -> str:
    """What the compiler says first: where it failed, and why."""
    lines = [line.strip().rstrip(":.") for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[:2])[:200] or type(error).__name__
