"""What an unlearning method is: rounds over an engine's verbs."""

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
    """One file or folder of this room each, found by its name: its options, what is tuned of them, and this class."""

    name: str
    """That of the file; the options stand in the configuration's section of this name."""
    options: type[MethodConfig]
    space: ClassVar[Ranges]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Values of the option `preset`, with what they set; each that is not the default is a label, NAME_PRESET."""
    unlearns: ClassVar[bool] = True
    """Whether `ofmu unlearn` offers it."""
    notes: Sequence[str]
    """What the user should know of the last round, in sentences."""

    @property
    def asks(self) -> frozenset[str]:
        """What its losses take for granted of the task (`Task.offers`)."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What has to be known about rows beforehand; () for most methods."""

    def freeze(self, module: torch.nn.Module) -> None:
        """Switch off what this method does not train (requires_grad), before the engine is built."""

    def start(self, engine: Engine) -> None:
        """Once, on the untouched weights and before a checkpoint is restored. Collective."""

    def batches_per_round(self) -> dict[str, int]:
        """Global batches that a round draws from each stream; the batch plan is laid out for exactly these."""

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """One round; returns the figures of the per-round series. Collective: every rank calls it.

        A further stream that `batches_per_round` names comes as an argument NAME_batches.
        """

    def state_dict(self) -> dict[str, Any]:
        """Readable loop state (JSON) for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""


def drawn(batches: Batches, stream: str) -> Iterator[Any]:
    """Batches one by one: an iterator is drawn from, a collection is gone round as often as needed."""
    source = iter(batches) if isinstance(batches, Iterator) else cycle(batches)
    empty = True
    for batch in source:
        empty = False
        yield batch
    found = "is empty" if empty else "ran out in the middle of a round"
    raise UserError(f"the stream of {stream} batches {found}: give the method as many batches as batches_per_round()")


def run_round(method: Method, engine: Engine, streams: Mapping[str, Iterable[Any]]) -> dict[str, float]:
    """A round on these streams' batches; the rows that `ofmu train` fits stand in for retain rows."""
    batches: dict[str, Any] = {name: iter(found) for name, found in streams.items()}
    forget = batches.pop("forget", iter(()))
    retain = batches.pop("retain", None) or batches.pop("train", iter(()))
    call: Callable[..., dict[str, float]] = method.round
    return call(engine, forget, retain, **{f"{name}_batches": found for name, found in batches.items()})
