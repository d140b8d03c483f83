"""The parameter space that the algorithm is written over: sharded vectors and the few verbs on them.

A `Vector` is this rank's share of a parameter-shaped vector, as a list of flat tensors whose layout belongs to the
engine. Linear algebra on vectors is elementwise, so it needs no communication; only inner products do. The same
algorithm therefore runs on one CPU and on ZeRO-3 over many nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch

Vector = list[torch.Tensor]
Loop = Literal["inner", "outer"]
Kind = Literal["forget", "retain"]


class ParameterSpace(Protocol):
    """What the two loops ask of an engine."""

    offers_exact: bool
    """Whether `graph_gradient` works (double backward)."""

    def gradient(self, batch: Any, *, kind: Kind, differenced: bool = False) -> tuple[Vector, float]:
        """Gradient and value of the mean loss over the global batch.

        `differenced` says that the result enters a finite difference, so it must be as exact as the engine can.
        Collective. The vector is the caller's to keep and to change.
        """

    def displaced(self, vector: Vector, step: float) -> AbstractContextManager[None]:
        """Within the context the parameters are theta + step * vector; afterwards theta again, to the bit. Nests."""

    def apply(self, vector: Vector, loop: Loop) -> float:
        """One step of the loop's optimiser *down* `vector`; returns the vector's norm before clipping.

        Uses `vector` up: what it holds afterwards means nothing.
        """

    def first_moment(self, loop: Loop) -> Vector | None:
        """The running mean of the gradients that the loop's AdamW has stepped down; None before its first step.

        Not the caller's to change.
        """

    def dot(self, *pairs: tuple[Vector, Vector]) -> list[float]:
        """Inner products over all ranks in float64, one all-reduce for all pairs."""

    def parameters_norm(self) -> float:
        """|theta| of the trainable parameters."""

    def graph_gradient(self, batch: Any, *, kind: Kind) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Loss and gradients (one tensor per parameter) that autograd can differentiate again."""

    def parameters(self) -> Sequence[torch.Tensor]:
        """The trainable parameters, in the order of `graph_gradient`'s gradients."""

    def as_vector(self, tensors: Sequence[torch.Tensor]) -> Vector:
        """Parameter-shaped tensors as a vector of this space."""

    def as_tensors(self, vector: Vector) -> Sequence[torch.Tensor]:
        """The inverse of `as_vector`."""


# A fresh vector costs several times the arithmetic on it where the system hands out memory page by page (a CPU):
# hence a place for `combine` to write to, and the verbs in place.


def combine(a: float, x: Vector, b: float, y: Vector, out: Vector | None = None) -> Vector:
    """a x + b y, in `out` (which may be x, and must not be y) or as a new vector."""
    if out is None:
        return [torch.mul(xi, a).add_(yi, alpha=b) for xi, yi in zip(x, y, strict=True)]
    for xi, yi, oi in zip(x, y, out, strict=True):
        torch.mul(xi, a, out=oi).add_(yi, alpha=b)
    return out


def add_(x: Vector, y: Vector, alpha: float = 1.0) -> Vector:
    """x += alpha y; returns x."""
    for xi, yi in zip(x, y, strict=True):
        xi.add_(yi, alpha=alpha)
    return x


def scale_(x: Vector, a: float) -> Vector:
    """x *= a; returns x."""
    for xi in x:
        xi.mul_(a)
    return x
