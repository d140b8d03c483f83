"""Products with Hessians: by finite differences of gradients (any engine) or by double backward (the reference).

    H v  ~ (g(theta + s v) - g(theta)) / s             forward: one extra pass, g(theta) is already there
    H v  ~ (g(theta + s v) - g(theta - s v)) / 2s      central: two extra passes

on one and the same batch; s is chosen so that the displacement has norm relative_step * |theta|. The Hessian of Phi
is the same difference of grad Phi itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from ofmu_ray.algorithm.similarity import Similarity
from ofmu_ray.algorithm.space import Kind, ParameterSpace, Vector, combine

# A displacement so small that it cannot be told from rounding has no usable difference.
TINY = 1e-30
# The difference of grad Phi divides the rounding noise of its inner differences by a step once more, so that all
# steps of the penalty's curvature are longer than those of grad Phi alone (docs/decisions.md has the error against
# triple backward by step).
NESTED_STEP_RATIO = {"forward": 10.0, "central": 3.0}


class Curvature(Protocol):
    """Products with the Hessians of one loss and of Phi."""

    differenced: bool
    """Whether base gradients enter a difference (so that the engine computes them as exactly as it can)."""

    def hessian_vector(self, batch: Any, kind: Kind, base: Vector, direction: Vector, norm: float) -> Vector:
        """H v for the loss on `batch`; `base` is its gradient at theta, `norm` the norm of v = `direction`."""

    def phi_hessian_vector(
        self, phi: Callable[[], Vector], base: Vector, norm: float, batches: tuple[Any, Any], beta: float
    ) -> Vector:
        """(Hess Phi) v for v = `base` = grad Phi(theta) of norm `norm`; `phi()` evaluates grad Phi where theta is."""

    def nested(self) -> Curvature:
        """The same for a grad Phi that is itself differenced."""


class FiniteDifference:
    """Differences of first-order gradients; works on every engine and attention kernel."""

    differenced = True

    def __init__(self, space: ParameterSpace, difference: Literal["forward", "central"], relative_step: float):
        self.space = space
        self.difference: Literal["forward", "central"] = difference
        self.relative_step = relative_step
        self.step = relative_step * space.parameters_norm()

    def hessian_vector(self, batch: Any, kind: Kind, base: Vector, direction: Vector, norm: float) -> Vector:
        def gradient() -> Vector:
            return self.space.gradient(batch, kind=kind, differenced=True)[0]

        return self._difference(gradient, base, direction, norm)

    def phi_hessian_vector(
        self, phi: Callable[[], Vector], base: Vector, norm: float, batches: tuple[Any, Any], beta: float
    ) -> Vector:
        return self._difference(phi, base, base, norm)

    def nested(self) -> FiniteDifference:
        """Longer steps, for a grad Phi that is itself differenced."""
        return FiniteDifference(self.space, self.difference, self.relative_step * NESTED_STEP_RATIO[self.difference])

    def _difference(self, function: Callable[[], Vector], base: Vector, direction: Vector, norm: float) -> Vector:
        if norm < TINY:  # e.g. Sim is stationary because the gradients are parallel
            return [torch.zeros_like(x) for x in direction]
        s = self.step / norm
        with self.space.displaced(direction, s):
            plus = function()
        if self.difference == "forward":
            return combine(1.0 / s, plus, -1.0 / s, base, out=plus)
        with self.space.displaced(direction, -s):
            minus = function()
        return combine(0.5 / s, plus, -0.5 / s, minus, out=plus)


class Exact:
    """Double and triple backward; single process, eager attention. The reference for the differences."""

    differenced = False

    def __init__(self, space: ParameterSpace, similarity: Similarity):
        self.space = space
        self.similarity = similarity

    def hessian_vector(self, batch: Any, kind: Kind, base: Vector, direction: Vector, norm: float) -> Vector:
        _, g = self.space.graph_gradient(batch, kind=kind)
        v = self.space.as_tensors(direction)
        return self.space.as_vector(self._grad(_inner(g, v)))

    def phi_hessian_vector(
        self, phi: Callable[[], Vector], base: Vector, norm: float, batches: tuple[Any, Any], beta: float
    ) -> Vector:
        _, g_f = self.space.graph_gradient(batches[0], kind="forget")
        _, g_r = self.space.graph_gradient(batches[1], kind="retain")
        cosine = _inner(g_f, g_r) / (_inner(g_f, g_f) * _inner(g_r, g_r)).sqrt()
        sim = cosine**2 if self.similarity == "squared_cosine" else cosine
        grad_sim = self._grad(sim, create_graph=True)
        grad_phi = [f - beta * s for f, s in zip(g_f, grad_sim, strict=True)]
        return self.space.as_vector(self._grad(_inner(grad_phi, self.space.as_tensors(base))))

    def nested(self) -> Exact:
        """Double backward has no step."""
        return self

    def _grad(self, scalar: torch.Tensor, create_graph: bool = False) -> list[torch.Tensor]:
        parameters = list(self.space.parameters())
        if not scalar.requires_grad:  # a loss whose gradient is constant has no curvature
            return [torch.zeros_like(p) for p in parameters]
        return list(torch.autograd.grad(scalar, parameters, create_graph=create_graph, materialize_grads=True))


def _inner(x: Any, y: Any) -> torch.Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()
