"""The parameter space that the algorithm works on: sharded vectors and a few operations.

A `Vector` is this rank's shard of a parameter-shaped vector: a list of flat tensors in a layout that the engine
chooses. Linear algebra on vectors is elementwise and needs no communication; only inner products do. So the same
algorithm runs on one CPU and on ZeRO-3 over many nodes.
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
    """What the two loops need from an engine."""

    offers_exact: bool
    """Whether `graph_gradient` works (double backward)."""

    def gradient(self, batch: Any, *, kind: Kind, differenced: bool = False) -> tuple[Vector, float]:
        """Gradient and value of the mean loss over the global batch.

        `differenced`: the result enters a finite difference, so the engine computes it as exactly as it can.
        Collective. The caller owns the vector and may change it.
        """

    def displaced(self, vector: Vector, step: float) -> AbstractContextManager[None]:
        """Within the context the parameters are theta + step * vector; afterwards theta again, bit for bit. Nests."""

    def apply(self, vector: Vector, loop: Loop) -> float:
        """One step of the loop's optimiser *down* `vector`; returns the vector's norm before clipping.

        Consumes `vector`: its content is undefined afterwards.
        """

    def first_moment(self, loop: Loop) -> Vector | None:
        """First moment of the loop's AdamW: the running mean of its gradients. None before its first step.

        Read-only.
        """

    def dot(self, *pairs: tuple[Vector, Vector]) -> list[float]:
        """Inner products over all ranks in float64, with one all-reduce for all pairs."""

    def parameters_norm(self) -> float:
        """|theta| of the trainable parameters."""

    def graph_gradient(self, batch: Any, *, kind: Kind) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Loss and gradients (one tensor per parameter) that autograd can differentiate further."""

    def parameters(self) -> Sequence[torch.Tensor]:
        """The trainable parameters, in the order of `graph_gradient`'s gradients."""

    def as_vector(self, tensors: Sequence[torch.Tensor]) -> Vector:
        """Parameter-shaped tensors as a vector of this space."""

    def as_tensors(self, vector: Vector) -> Sequence[torch.Tensor]:
        """The inverse of `as_vector`."""


# On a CPU, allocating a new vector costs several times the arithmetic on it, because the system maps memory page by
# page. Hence `combine`'s `out` and the in-place operations.


def combine(a: float, x: Vector, b: float, y: Vector, out: Vector | None = None) -> Vector:
    """a x + b y, in `out` (which may be x but not y) or as a new vector."""
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
