"""Hessian-vector products by finite differences of gradients (any engine) or by double backward (the reference).

    H v  ~ (g(theta + s v) - g(theta)) / s             forward: one extra pass, g(theta) is already known
    H v  ~ (g(theta + s v) - g(theta - s v)) / 2s      central: two extra passes

on the same batch. s makes the norm of the displacement relative_step * |theta|; the relative step is either fixed or
measured per product (`steps`). The Hessian of Phi is the same difference of grad Phi.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from ofmu_ray.algorithm.similarity import Similarity
from ofmu_ray.algorithm.space import Kind, ParameterSpace, Vector, add_, combine, scale_
from ofmu_ray.algorithm.steps import (
    CLOSE,
    LONGEST,
    SHORTEST,
    START,
    WALKS,
    Product,
    Step,
    StepEstimate,
    Steps,
    noise_of,
)

# A displacement this small drowns in rounding: its difference is unusable.
TINY = 1e-30
# The difference of grad Phi divides the rounding noise of its inner differences by a step again, so the penalty's
# curvature needs longer steps than grad Phi alone (docs/decisions.md: error against triple backward, by step).
NESTED_STEP_RATIO = {"forward": 10.0, "central": 3.0}


class Curvature(Protocol):
    """Products with the Hessians of one loss and of Phi."""

    differences: bool
    """Whether gradients are differenced. The engine then computes those at theta as exactly as it can, also where they
    only give the direction: rounding of relative size e in g_f and g_r turns u and w by e / sin(g_f, g_r)."""

    def hessian_vector(
        self, batch: Any, kind: Kind, base: Vector, direction: Vector, norm: float, *, penalty: bool = False
    ) -> Vector:
        """H v of the loss on `batch`; `base` is its gradient at theta, `norm` the norm of v = `direction`.

        `penalty`: the product belongs to the penalty, not to the similarity.
        """

    def phi_hessian_vector(
        self, phi: Callable[[], Vector], base: Vector, norm: float, batches: tuple[Any, Any], beta: float
    ) -> Vector:
        """(Hess Phi) v for v = `base` = grad Phi(theta) of norm `norm`; `phi()` evaluates grad Phi at theta."""

    def nested(self) -> Curvature:
        """The same for a grad Phi that is itself differenced."""

    def error(self, product: Product) -> float | None:
        """Estimated norm of the error of the last such product; None if unknown."""


class FiniteDifference:
    """Differences of first-order gradients. Works with every engine and attention kernel."""

    differences = True

    def __init__(self, space: ParameterSpace, difference: Literal["forward", "central"], relative_step: float):
        self.space = space
        self.difference: Literal["forward", "central"] = difference
        self.relative_step = relative_step
        self.step = relative_step * space.parameters_norm()

    def hessian_vector(
        self, batch: Any, kind: Kind, base: Vector, direction: Vector, norm: float, *, penalty: bool = False
    ) -> Vector:
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

    def error(self, product: Product) -> float | None:
        return None

    def _difference(self, function: Callable[[], Vector], base: Vector, direction: Vector, norm: float) -> Vector:
        if norm < TINY:  # for example, Sim is stationary because the gradients are parallel
            return [torch.zeros_like(x) for x in direction]
        return _quotient(self.space, function, base, direction, self.step / norm, self.difference == "central")


class MeasuredDifference:
    """Differences with one step per product, chosen from the noise and curvature that four gradients show.

    Between checks, a product costs a forward or a central difference; its last check decides which. A central one whose
    step has become too long asks for a check.
    """

    differences = True

    def __init__(self, space: ParameterSpace, steps: Steps, *, nested: bool = False):
        self.space, self.steps, self._nested = space, steps, nested
        self.theta = space.parameters_norm()
        self._errors: dict[Product, float] = {}

    def _inside(self, product: Product) -> bool:
        """Whether the product is part of a grad Phi that is itself differenced."""
        return self._nested and product != "penalty"

    def hessian_vector(
        self, batch: Any, kind: Kind, base: Vector, direction: Vector, norm: float, *, penalty: bool = False
    ) -> Vector:
        def gradient() -> Vector:
            return self.space.gradient(batch, kind=kind, differenced=True)[0]

        return self._difference("penalty" if penalty else kind, gradient, base, direction, norm)

    def phi_hessian_vector(
        self, phi: Callable[[], Vector], base: Vector, norm: float, batches: tuple[Any, Any], beta: float
    ) -> Vector:
        return self._difference("penalty", phi, base, base, norm)

    def nested(self) -> MeasuredDifference:
        """The same steps for the penalty; longer, unchecked steps for the halves of grad Sim inside grad Phi."""
        return MeasuredDifference(self.space, self.steps, nested=True)

    def error(self, product: Product) -> float | None:
        return self._errors.get(product)

    def _difference(
        self, product: Product, function: Callable[[], Vector], base: Vector, direction: Vector, norm: float
    ) -> Vector:
        if norm < TINY:
            self._errors[product] = 0.0
            return [torch.zeros_like(x) for x in direction]
        # without a step from grad Phi itself (its forget batches were at their level), this one is checked here
        inside = self._inside(product) and product in self.steps.products
        curved = None
        if not inside:
            gradient = math.sqrt(self.space.dot((base, base))[0])
            due = self.steps.due(product, gradient)
            if not due and self.steps.products[product].central:
                curved = self._central(product, function, base, direction, norm)
                due = curved is None
            if due:
                curved = self._check(product, function, base, direction, norm, gradient)
        step = self.steps.products[product]
        self._errors[product] = norm * step.error
        if curved is not None:
            return curved
        ratio = NESTED_STEP_RATIO["central" if step.central else "forward"] if inside else 1.0
        length = step.relative * ratio * self.theta
        return _quotient(self.space, function, base, direction, length / norm, step.central)

    def _central(
        self, product: Product, function: Callable[[], Vector], base: Vector, direction: Vector, norm: float
    ) -> Vector | None:
        """The product by a central difference; None if the step has become too long."""
        step = self.steps.products[product]
        s = step.relative * self.theta / norm
        bent, difference = _sum_and_difference(self.space, function, base, direction, s)
        squares = self.space.dot((bent, bent), (difference, difference))
        return None if step.too_long(*squares) else scale_(difference, 0.5 / s)

    def _check(
        self,
        product: Product,
        function: Callable[[], Vector],
        base: Vector,
        direction: Vector,
        norm: float,
        gradient: float,
    ) -> Vector:
        """Choose a new step for the product; return the product by the better of the check's central differences."""
        before = self.steps.products.get(product)
        h = (START if before is None else before.probe) * self.theta

        def pair(length: float) -> tuple[Vector, Vector]:
            return _sum_and_difference(self.space, function, base, direction, length / norm)

        long, short = pair(h), pair(h / 4)
        last, rounding = 0, 0.0
        for walk in range(WALKS + 1):
            estimate = self._estimate(h, long, short, gradient)
            if estimate is not None and estimate.rough and not rounding:
                del long  # a check never holds three pairs
                close = pair(CLOSE * self.theta)[0]
                rounding = noise_of(self.space.dot((close, close))[0])
                del close
                long = pair(h)
            move = -1 if estimate is None else estimate.move(self.steps.difference, rounding)
            if not move or move == -last or walk == WALKS or not SHORTEST < 4.0**move * h / self.theta < LONGEST:
                break
            last = move
            if move < 0:
                long, h = short, h / 4
                del short
                short = pair(h / 4)
            else:
                short, h = long, h * 4
                del long
                long = pair(h)
        self.steps.products[product] = self._chosen(estimate, h, gradient)
        if estimate is not None and estimate.error(True, h / 4) < estimate.error(True, h):
            return scale_(short[1], 2 * norm / h)
        return scale_(long[1], norm / (2 * h))

    def _estimate(
        self, h: float, long: tuple[Vector, Vector], short: tuple[Vector, Vector], gradient: float
    ) -> StepEstimate | None:
        (s, d), (x, y) = long, short
        sums = self.space.dot((s, s), (s, x), (x, x), (d, d), (d, y), (y, y))
        eps = torch.finfo(s[0].dtype).eps
        return StepEstimate.of(h, sums, gradient, eps) if all(map(math.isfinite, sums)) else None

    def _chosen(self, estimate: StepEstimate | None, h: float, gradient: float) -> Step:
        if estimate is None:  # the gradient is not finite; the round will report it
            return Step(h / self.theta, self.steps.difference != "forward", math.inf, START, gradient, self.steps.round)
        central = estimate.central(self.steps.difference)
        safe = estimate.safe(central) / self.theta
        # powers of 2, so that engines with different rounding mostly take the same step
        relative = 2.0 ** round(math.log2(min(max(safe, SHORTEST), LONGEST)))
        error = estimate.error(central, relative * self.theta)
        bend = estimate.bend(relative * self.theta)
        return Step(relative, central, error, h / self.theta, gradient, self.steps.round, bend)


def _quotient(
    space: ParameterSpace, function: Callable[[], Vector], base: Vector, direction: Vector, s: float, central: bool
) -> Vector:
    with space.displaced(direction, s):
        plus = function()
    if not central:
        return combine(1.0 / s, plus, -1.0 / s, base, out=plus)
    with space.displaced(direction, -s):
        minus = function()
    return combine(0.5 / s, plus, -0.5 / s, minus, out=plus)


def _sum_and_difference(
    space: ParameterSpace, function: Callable[[], Vector], base: Vector, direction: Vector, s: float
) -> tuple[Vector, Vector]:
    """g(s) + g(-s) - 2 g(0) and g(s) - g(-s), written over the two gradients."""
    with space.displaced(direction, s):
        plus = function()
    with space.displaced(direction, -s):
        minus = function()
    difference = add_(plus, minus, -1.0)
    return add_(scale_(add_(minus, base, -1.0), 2.0), difference), difference


class Exact:
    """Double and triple backward, single process, eager attention. The reference for the differences."""

    differences = False

    def __init__(self, space: ParameterSpace, similarity: Similarity):
        self.space = space
        self.similarity = similarity

    def hessian_vector(
        self, batch: Any, kind: Kind, base: Vector, direction: Vector, norm: float, *, penalty: bool = False
    ) -> Vector:
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

    def error(self, product: Product) -> float | None:
        """Unknown: only rounding."""
        return None

    def _grad(self, scalar: torch.Tensor, create_graph: bool = False) -> list[torch.Tensor]:
        parameters = list(self.space.parameters())
        if not scalar.requires_grad:  # a loss with a constant gradient has no curvature
            return [torch.zeros_like(p) for p in parameters]
        return list(torch.autograd.grad(scalar, parameters, create_graph=create_graph, materialize_grads=True))


def _inner(x: Any, y: Any) -> torch.Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()
