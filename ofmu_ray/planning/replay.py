"""Replays a method's rounds on vectors without storage: its passes, and the number of live vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ofmu_ray.config import OptimizerConfig, SharedBaseConfig
from ofmu_ray.engines.protocol import Batch, Kind, Loop, Loss, PassAccount, Vector
from ofmu_ray.errors import UserError
from ofmu_ray.methods.protocol import Method, run_round
from ofmu_ray.models.answers import causal_lm_loss
from ofmu_ray.planning.trace import Meter

UNIT = 1 << 20
"""Elements of a replayed vector, which represents a full vector of any model size."""


@dataclass(frozen=True)
class LiveVectors:
    """Live memory at a moment of a round, in vectors (fp32 copies of the trainable parameters)."""

    vectors: float
    """Vectors of the algorithm: gradients, directions, products."""
    saved: float
    """The copy of theta that a displacement restores."""
    moments: float
    """Moments of both loops' optimisers."""

    @property
    def total(self) -> float:
        return self.vectors + self.saved + self.moments


@dataclass(frozen=True)
class ReplayedPass:
    """One gradient pass of a round."""

    kind: Kind
    loss: Loss
    differenced: bool
    live: LiveVectors
    """Live vectors before the pass creates its own."""
    batch: Any = field(compare=False)


@dataclass
class Round:
    """What a round after the first does, with all optimiser moments allocated."""

    passes: list[ReplayedPass] = field(default_factory=list)
    peak: LiveVectors = LiveVectors(0, 0, 0)
    """Most live vectors at any moment between passes."""
    between: float = 0
    """Vectors that the method has between rounds."""
    kept: int = 0
    """Of these in checkpoints."""
    refreshes: int = 0
    """Updates of the forward weights: two per displacement, one per step."""
    steps: dict[str, int] = field(default_factory=dict)
    """Optimiser -> steps."""
    dots: int = 0
    """Calls of dot, one all-reduce each."""
    products: int = 0
    """Inner products in them."""
    vector_bytes: float = 0.0
    """Bytes read and written by linear algebra, steps, displacements and dots, for vectors of one byte."""
    fresh_bytes: float = 0.0
    """The same of new vectors."""


class PlanSpace:
    """The engine interface on meta vectors: the part of `engines.protocol.Engine` that methods use."""

    offers_exact = False
    device = torch.device("cpu")

    def __init__(self, module: torch.nn.Module, optimizers: tuple[OptimizerConfig, OptimizerConfig], precision: str):
        self.module, self.precision, self.loss_fn = module, precision, causal_lm_loss
        self.account = PassAccount()
        self.kept: dict[str, Vector] = {}
        self.meter = Meter(grown=self._grown)
        self.round = Round()
        self._optimizers: dict[Loop, OptimizerConfig] = dict(zip(("inner", "outer"), optimizers, strict=True))  # type: ignore[arg-type]
        self._moments: dict[Loop, int] = {"inner": 0, "outer": 0}
        self._saved = 0
        self._moment = self._vector()  # created outside the meter: counted with the moments
        self._peak = 0.0

    @property
    def live(self) -> LiveVectors:
        return LiveVectors(self.meter.live / UNIT / 4, self._saved, sum(self._moments.values()))

    def _grown(self, live: int) -> None:
        if self.live.total > self.round.peak.total:
            self.round.peak = self.live

    def _vector(self) -> Vector:
        return [torch.empty(UNIT, device="meta")]

    def gradient(
        self, batch: Any, loss: Loss | None = None, *, kind: Kind = "forget", differenced: bool = False, work: float = 1
    ) -> tuple[Vector, float]:
        pass_ = ReplayedPass(kind, loss or self.loss_fn, differenced or self._displaced > 0, self.live, batch)
        self.round.passes.append(pass_)
        return self._vector(), 1.0

    _displaced = 0

    @contextmanager
    def displaced(self, vector: Vector, step: float) -> Iterator[None]:
        self._saved = 1
        self._grown(self.meter.live)
        self.round.refreshes += 2
        self.round.vector_bytes += 4 * (3 + 2 + 1)  # start + step * vector and back; the occasional copy
        self._displaced += 1
        yield
        self._displaced -= 1

    def first_moment(self, loop: Loop) -> Vector | None:
        return self._moment if self._moments[loop] else None

    def apply(self, vector: Vector, loop: Loop) -> float:
        config = self._optimizers[loop]
        adam = config.name == "adamw"
        self._moments[loop] = 2 if adam else int(config.momentum > 0)
        if isinstance(config, SharedBaseConfig) and loop == "inner":
            self._moments[loop] += 2  # the shared base
        self._grown(self.meter.live)
        self.round.refreshes += 1
        self.round.steps[config.name] = self.round.steps.get(config.name, 0) + 1
        self.round.vector_bytes += 4 * (3 + 2 * self._moments[loop])
        self.dot((vector, vector))
        self.account.updates += 1
        return 1.0

    def dot(self, *pairs: tuple[Vector, Vector]) -> list[float]:
        self.round.dots += 1
        self.round.products += len(pairs)
        self.round.vector_bytes += 4 * len({id(vector) for pair in pairs for vector in pair})
        return [1.0 if a is b else 0.5 for a, b in pairs]

    def parameters_norm(self) -> float:
        self.round.dots += 1
        self.round.products += 1
        self.round.vector_bytes += 4
        return 1.0

    def weights(self) -> Vector:
        return self._vector()

    def set_learning_rate(self, loop: Loop, lr: float) -> None:
        """No cost."""

    def graph_gradient(self, *_: Any, **__: Any) -> Any:
        raise UserError("memory and time of double backward cannot be planned")


def replay(
    method: Method, module: torch.nn.Module, optimizers: tuple[OptimizerConfig, OptimizerConfig], precision: str,
    batches: Callable[[str], Mapping[str, Any]],
) -> Round:  # fmt: skip
    """The second round of `method`, with as many live vectors as the first, which may measure steps.

    `batches(stream)`: a micro-batch of the stream. Dot products are made up such that `ofmu.difference = auto` chooses
    central differences, its maximum cost.
    """
    space: Any = PlanSpace(module, optimizers, precision)
    if getattr(getattr(method, "config", None), "curvature", None) == "exact":
        space.graph_gradient()
    counts = method.batches_per_round()
    with space.meter:
        method.start(space)
        first: Round | None = None
        for _ in range(2):
            first, space.round = space.round, Round()
            before = space.meter.bytes_moved
            run_round(
                method, space, {name: [Batch([batches(name)])] * count for name, count in counts.items() if count}
            )
            space.round.vector_bytes += (space.meter.bytes_moved - before) / UNIT
        space.round.between, space.round.kept = space.live.vectors, len(space.kept)
    second: Round = space.round
    assert first is not None
    second.peak = max(first.peak, second.peak, key=lambda live: live.total)
    second.passes = [
        replace(one, live=max(_live_before(one, first), key=lambda live: live.total)) for one in second.passes
    ]
    return second


def _live_before(one: ReplayedPass, first: Round) -> Iterator[LiveVectors]:
    """Live vectors before `one`, and before passes of its kind in the first round (which creates the moments)."""
    yield one.live
    for other in first.passes:
        if (other.kind, other.differenced) == (one.kind, one.differenced):
            yield replace(other.live, moments=one.live.moments)
