"""The interface of unlearning methods: rounds on top of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    import torch

    from ofmu_ray.config.methods import MethodConfig, Ranges
    from ofmu_ray.engines.protocol import Engine
    from ofmu_ray.features.protocol import Need

Batches = Iterable[Any]


class Method(Protocol):
    """A method: a file or folder of this package, discovered by name, with its options, search space and this class."""

    name: str
    """The file's name, and that of the configuration section with the options."""
    options: type[MethodConfig]
    space: ClassVar[Ranges]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Preset -> the options it sets; every preset but the default has a label NAME_PRESET."""
    unlearns: ClassVar[bool] = True
    """Whether `ofmu unlearn` offers it."""
    notes: Sequence[str]
    """Messages for the user about the last round."""

    @property
    def asks(self) -> frozenset[str]:
        """What its losses require of the task (`Task.offers`)."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """Features of rows to compute beforehand; () for most methods."""

    def freeze(self, module: torch.nn.Module) -> None:
        """Freeze what this method does not train (requires_grad), before the engine is built."""

    def start(self, engine: Engine) -> None:
        """Called once, on the reference model, before a checkpoint is restored. Collective."""

    # optional: def given(self, name: str, engine: Engine, parameters: Mapping[str, torch.Tensor]) -> None
    # after `start`: the tensors of a `ParameterValues` that it needs, by the names of parameters. Collective.

    # optional: def measured(self, references: Sequence[Missing]) -> None
    # before `start`: what the workers have computed for options that `MethodConfig.completed` left open.

    def batches_per_round(self) -> dict[str, int]:
        """Global batches per round and stream; the batch plan contains exactly these."""

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One round; returns the metrics of the per-round series. Collective: every rank calls it.

        Any other stream of `batches_per_round` is passed as the argument NAME_batches.
        """

    def state_dict(self) -> dict[str, Any]:
        """Readable loop state (JSON) for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""


def drawn(batches: Batches, stream: str) -> Iterator[Any]:
    """Batches one by one: an iterator is consumed, a collection is cycled."""
    source = iter(batches) if isinstance(batches, Iterator) else cycle(batches)
    empty = True
    for batch in source:
        empty = False
        yield batch
    problem = "is empty" if empty else "ran out in the middle of a round"
    raise UserError(f"the stream of {stream} batches {problem}: give the method as many batches as batches_per_round()")


def run_round(method: Method, engine: Engine, streams: Mapping[str, Iterable[Any]]) -> dict[str, float]:
    """A round on these streams' batches; `ofmu train` passes its rows as retain rows."""
    batches: dict[str, Any] = {name: iter(stream) for name, stream in streams.items()}
    forget = batches.pop("forget", iter(()))
    retain = batches.pop("retain", None) or batches.pop("train", iter(()))
    call: Callable[..., dict[str, float]] = method.round
    return call(engine, forget, retain, **{f"{name}_batches": stream for name, stream in batches.items()})
