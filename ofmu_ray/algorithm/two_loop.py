"""One round of OFMU's two loops (arXiv 2509.22483, Algorithm 1) over a parameter space.

    inner, T times:   theta <- theta + eta_in  grad Phi(theta),   Phi = L_f - beta Sim(g_f, g_r)
    outer, once:      theta <- theta - eta_out (grad L_r + 2 rho_k (Hess Phi)(grad Phi))
    schedule:         rho_{k+1} = gamma rho_k

`Options` controls the approximations. `full` and `lite` of ofmu_ray.config are two settings (14 + 14 and 7 + 3 passes
for T = 5 with forward differences).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ofmu_ray.algorithm.curvature import Curvature, Exact, FiniteDifference, MeasuredDifference
from ofmu_ray.algorithm.similarity import Similarity, SimilarityCoefficients, similarity_coefficients
from ofmu_ray.algorithm.space import Kind, ParameterSpace, Vector, add_, combine, scale_
from ofmu_ray.algorithm.steps import Difference, Steps

LEVEL_TOLERANCE = 1e-5
"""Relative rounding error of a mean of fp32 losses that are all at the level."""


class Options(Protocol):
    """The options of a round; ofmu_ray.config.OFMUConfig declares and explains them."""

    @property
    def beta(self) -> float: ...
    @property
    def inner_steps(self) -> int: ...
    @property
    def outer_steps(self) -> int: ...
    @property
    def similarity(self) -> Similarity: ...
    @property
    def curvature(self) -> Literal["finite_difference", "exact"]: ...
    @property
    def difference(self) -> Difference: ...
    @property
    def penalty_curvature(self) -> Literal["full", "forget", "none"]: ...
    @property
    def decorrelate_every(self) -> int | None: ...
    @property
    def reuse_retain_gradient(self) -> bool: ...
    @property
    def reuse_forget_gradient(self) -> bool: ...
    @property
    def projection(self) -> float: ...


@dataclass
class RoundStats:
    """Measurements of one round. None: not measured with these options (no cosine when beta = 0)."""

    forget_loss: float = math.nan
    """L_f at the last inner iterate (nats per token)."""
    retain_loss: float = math.nan
    """L_r at the first outer step (nats per token)."""
    gradient_cosine: float | None = None
    """cos(g_f, g_r) at the last refresh of the similarity."""
    phi_gradient_norm: float | None = None
    """|grad Phi| where the penalty is taken, else at the last inner step."""
    outer_gradient_norm: float = math.nan
    """Norm of the first outer step's direction before clipping."""
    penalty_norm: float | None = None
    """Norm of 2 rho (Hess Phi)(grad Phi)."""
    conflict_cosine: float | None = None
    """cos(ascent direction, the outer optimiser's first moment) at the last inner step, before the projection."""
    skipped_ascents: int | None = None
    """Inner steps skipped because the complete batch was already at its level."""
    penalty_ratio: float | None = None
    """`penalty_norm` / |grad L_r|."""
    similarity_error: float | None = None
    """Estimated |error of grad Sim| / |grad Sim| of the last refresh (measured steps only)."""
    difference_error: float | None = None
    """beta times that error, relative to |g_f|."""
    inner_gradient_norms: list[float] = field(default_factory=list)
    """|grad Phi| at each inner step, before clipping."""


def two_loop_round(
    space: ParameterSpace,
    forget: Iterator[Any],
    retain: Iterator[Any],
    options: Options,
    *,
    rho: float,
    steps: Steps | float,
    level: float | None = None,
) -> RoundStats:
    """One round: T inner ascent steps on Phi, then the outer step(s). Collective.

    Args:
        space: the engine.
        forget, retain: batches, drawn as needed (`batches_per_round`).
        rho: rho_k of this round.
        steps: of finite differences: measured (and kept from round to round) or a fixed |displacement| / |theta|.
        level: largest value of the forget loss. A batch at this value has no gradient; its step is skipped, because
            momentum would still move the parameters. None: the loss has no bound.
    """
    stats = RoundStats(skipped_ascents=None if level is None else 0)
    curvature = _curvature(space, options, steps)
    phi = _Phi(space, curvature, options)
    penalise = rho > 0.0 and options.penalty_curvature != "none"
    lagged = penalise and options.penalty_curvature == "forget" and options.reuse_forget_gradient
    penalty: Vector | None = None

    for t in range(options.inner_steps):
        last = t == options.inner_steps - 1
        batch = next(forget)
        enters = curvature.differences and (phi.stale(t) or (last and lagged))
        g_f, stats.forget_loss = space.gradient(batch, kind="forget", differenced=enters)
        if level is not None and stats.forget_loss >= level * (1 - LEVEL_TOLERANCE):
            stats.skipped_ascents = (stats.skipped_ascents or 0) + 1
            continue
        if phi.stale(t):
            phi.refresh(batch, g_f, lambda: next(retain))
        ascent = phi.gradient(g_f, keep=last and lagged)
        if last and lagged:
            # g_f of the last inner iterate is already known, so the difference costs one pass instead of two
            penalty = _forget_penalty(space, curvature, batch, g_f, ascent, rho, stats)
        if options.projection > 0:
            project(space, ascent, options.projection, stats)
        stats.inner_gradient_norms.append(space.apply(scale_(ascent, -1.0), "inner"))
        del g_f, ascent  # one vector each; lowers the outer step's peak memory
    if stats.phi_gradient_norm is None:
        stats.phi_gradient_norm = stats.inner_gradient_norms[-1] if stats.inner_gradient_norms else 0.0

    for s in range(options.outer_steps):
        batch = next(retain)
        if s == 0 and penalise and not lagged and options.penalty_curvature == "full":
            phi = phi.nested()
        enters = s == 0 and penalise and not lagged and phi.penalty_differences("retain")
        g_r, loss = space.gradient(batch, kind="retain", differenced=enters)
        if s == 0:
            stats.retain_loss = loss
            if penalise and not lagged:
                penalty = phi.penalty(next(forget), batch, g_r, rho, stats)
            if penalty is not None:
                stats.penalty_ratio = _ratio(stats.penalty_norm, math.sqrt(space.dot((g_r, g_r))[0]))
                add_(g_r, penalty)
                penalty = None
        norm = space.apply(g_r, "outer")
        if s == 0:
            stats.outer_gradient_norm = norm
    stats.gradient_cosine = phi.cosine
    stats.similarity_error, stats.difference_error = phi.errors
    return stats


def project(space: ParameterSpace, ascent: Vector, share: float, stats: RoundStats) -> None:
    """Remove `share` of the component that raises the retain loss from an ascent direction, in place.

    Costs one all-reduce and no pass: the outer optimiser's first moment serves as the retain gradient. A component that
    lowers the retain loss stays (as in PCGrad, Yu et al. 2020, arXiv 2001.06782).
    """
    mean = space.first_moment("outer")
    if mean is None:
        return
    conflict, own, other = space.dot((ascent, mean), (ascent, ascent), (mean, mean))
    if own > 0 and other > 0:
        stats.conflict_cosine = conflict / math.sqrt(own * other)
        if conflict > 0:
            add_(ascent, mean, -share * conflict / other)


def batches_per_round(options: Options, *, penalise: bool) -> dict[str, int]:
    """Global batches that a round takes from each stream; `penalise`: rho_0 > 0."""
    refreshes = 0
    if options.beta > 0:
        refreshes = 1 if options.reuse_retain_gradient else len(_refresh_steps(options))
    lagged = options.penalty_curvature == "forget" and options.reuse_forget_gradient
    extra = 1 if penalise and options.penalty_curvature != "none" and not lagged else 0
    return {"forget": options.inner_steps + extra, "retain": refreshes + options.outer_steps}


def _refresh_steps(options: Options) -> range:
    return range(0, options.inner_steps, options.decorrelate_every or options.inner_steps)


def _ratio(a: float | None, b: float) -> float | None:
    return None if a is None or b == 0.0 else a / b


def _curvature(space: ParameterSpace, options: Options, steps: Steps | float) -> Curvature:
    if options.curvature == "exact":
        return Exact(space, options.similarity)
    if isinstance(steps, Steps):
        return MeasuredDifference(space, steps)
    return FiniteDifference(space, "central" if options.difference == "central" else "forward", steps)


class _Phi:
    """grad Phi = g_f - beta grad Sim. Keeps the part of grad Sim that the options reuse over inner steps."""

    def __init__(self, space: ParameterSpace, curvature: Curvature, options: Options):
        self.space, self.curvature, self.options = space, curvature, options
        self.cosine: float | None = None
        self.errors: tuple[float | None, float | None] = None, None
        """Estimated error of grad Sim relative to |grad Sim|, and beta times it relative to |g_f|."""
        self._sim: Vector | None = None
        self._due = False
        self._g_r: Vector | None = None
        self._retain_half: Vector | None = None
        self._direction: Vector | None = None  # buffer for u and w, which are combinations of g_f and g_r

    def nested(self) -> _Phi:
        """A fresh grad Phi, for differencing itself: takes over the buffer and nothing else."""
        other = _Phi(self.space, self.curvature.nested(), self.options)
        other._direction, other.errors = self._direction, self.errors
        return other

    def stale(self, step: int) -> bool:
        """Whether this inner step needs a refresh: its own, or that of an earlier step which was skipped."""
        self._due = self._due or (self.options.beta > 0 and step in _refresh_steps(self.options))
        return self._due

    def gradient(self, g_f: Vector, *, keep: bool = False) -> Vector:
        """grad Phi, written over g_f unless `keep`."""
        if self._sim is None:
            return g_f
        if not keep:
            return add_(g_f, self._sim, -self.options.beta)
        buffer, self._direction = self._direction, None  # u and w are no longer needed
        return combine(1.0, g_f, -self.options.beta, self._sim, out=buffer)

    def refresh(self, forget_batch: Any, g_f: Vector, retain_batch: Callable[[], Any]) -> None:
        """grad Sim = H_f u + H_r w at theta; reuses the retain half of an earlier refresh if configured."""
        self._due = False
        self._sim = None  # frees a vector before new ones are allocated
        if self._g_r is not None:
            k = self._coefficients(g_f, self._g_r)
            assert self._retain_half is not None
            self._sim = add_(self._forget_half(forget_batch, g_f, self._g_r, k), self._retain_half)
            self._record_errors(g_f)
            return
        batch = retain_batch()
        g_r, _ = self.space.gradient(batch, kind="retain", differenced=self.curvature.differences)
        self._sim, retain_half = self._similarity_gradient(forget_batch, batch, g_f, g_r)
        self._record_errors(g_f)
        if self.options.reuse_retain_gradient and len(_refresh_steps(self.options)) > 1:
            self._g_r, self._retain_half = g_r, retain_half

    def _record_errors(self, g_f: Vector) -> None:
        halves = self.curvature.error("forget"), self.curvature.error("retain")
        if halves[0] is None or halves[1] is None or self._sim is None:
            return
        error = math.hypot(halves[0], halves[1])
        sim, forget = map(math.sqrt, self.space.dot((self._sim, self._sim), (g_f, g_f)))
        self.errors = _ratio(error, sim), _ratio(self.options.beta * error, forget)

    def penalty_differences(self, kind: Kind) -> bool:
        """Whether the gradient of this loss at theta enters a difference in `penalty`."""
        whole = self.options.penalty_curvature == "full"  # differences grad Phi, which both are part of
        return self.curvature.differences and (self._refreshes_for_penalty() or whole or kind == "forget")

    def penalty(self, forget_batch: Any, retain_batch: Any, g_r: Vector, rho: float, stats: RoundStats) -> Vector:
        """2 rho (Hess Phi)(grad Phi) at theta, where g_r = grad L_r. Curvature of Phi (`full`) or of L_f alone."""
        space, options = self.space, self.options
        g_f, _ = space.gradient(forget_batch, kind="forget", differenced=self.penalty_differences("forget"))
        if self._refreshes_for_penalty():
            self._sim = None
            self._sim, _ = self._similarity_gradient(forget_batch, retain_batch, g_f, g_r)
        if options.penalty_curvature == "forget" or options.beta == 0:
            v = self.gradient(g_f, keep=True)
            return _forget_penalty(space, self.curvature, forget_batch, g_f, v, rho, stats)
        v = self.gradient(g_f)

        def phi_gradient() -> Vector:
            f, _ = space.gradient(forget_batch, kind="forget", differenced=True)
            r, _ = space.gradient(retain_batch, kind="retain", differenced=True)
            sim, _ = self._similarity_gradient(forget_batch, retain_batch, f, r)
            return add_(f, sim, -options.beta)

        cosine = self.cosine  # the displaced evaluations overwrite self.cosine
        norm = math.sqrt(space.dot((v, v))[0])
        curved = self.curvature.phi_hessian_vector(phi_gradient, v, norm, (forget_batch, retain_batch), options.beta)
        self.cosine = cosine
        return _scaled_penalty(space, curved, norm, rho, stats)

    def _refreshes_for_penalty(self) -> bool:
        keeps = self._sim is not None and self.options.decorrelate_every is None
        return self.options.beta > 0 and (self.options.penalty_curvature == "full" or not keeps)

    def _coefficients(self, g_f: Vector, g_r: Vector) -> SimilarityCoefficients:
        ff, fr, rr = self.space.dot((g_f, g_f), (g_f, g_r), (g_r, g_r))
        k = similarity_coefficients(ff, fr, rr, self.options.similarity)
        self.cosine = k.cosine
        return k

    def _forget_half(self, batch: Any, g_f: Vector, g_r: Vector, k: SimilarityCoefficients) -> Vector:
        self._direction = u = combine(k.u_f, g_f, k.u_r, g_r, out=self._direction)
        return self.curvature.hessian_vector(batch, "forget", g_f, u, k.u_norm)

    def _similarity_gradient(
        self, forget_batch: Any, retain_batch: Any, g_f: Vector, g_r: Vector
    ) -> tuple[Vector, Vector]:
        """(grad Sim, its retain half H_r w)."""
        k = self._coefficients(g_f, g_r)
        forget_half = self._forget_half(forget_batch, g_f, g_r, k)
        self._direction = w = combine(k.w_f, g_f, k.w_r, g_r, out=self._direction)
        retain_half = self.curvature.hessian_vector(retain_batch, "retain", g_r, w, k.w_norm)
        return add_(forget_half, retain_half), retain_half


def _forget_penalty(
    space: ParameterSpace, curvature: Curvature, batch: Any, g_f: Vector, v: Vector, rho: float, stats: RoundStats
) -> Vector:
    """2 rho H_f v: the gradient of the penalty with the curvature of L_f alone."""
    norm = math.sqrt(space.dot((v, v))[0])
    curved = curvature.hessian_vector(batch, "forget", g_f, v, norm, penalty=True)
    return _scaled_penalty(space, curved, norm, rho, stats)


def _scaled_penalty(space: ParameterSpace, curved: Vector, norm: float, rho: float, stats: RoundStats) -> Vector:
    stats.phi_gradient_norm = norm
    stats.penalty_norm = 2.0 * rho * math.sqrt(space.dot((curved, curved))[0])
    return scale_(curved, 2.0 * rho)
