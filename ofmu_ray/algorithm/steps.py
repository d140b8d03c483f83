"""How far to displace for a difference of gradients, and what the difference is then worth.

Along a unit direction v the gradient at a displacement h is g + h Hv + h^2 A/2 + h^3 B/6 + noise of norm sigma (the
rounding of a pass), so that

    forward   (g(h) - g) / h           errs by  |A| h / 2    and by  sqrt(2) sigma / h
    central   (g(h) - g(-h)) / 2h      errs by  |B| h^2 / 6  and by  sigma / (sqrt(2) h)

Gradients at h, -h, h/4 and -h/4 tell |A|, |B| and sigma. With S(h) = g(h) + g(-h) - 2g = A h^2 + noise and C(h) the
central difference, S(h/4) - S(h)/16 is noise alone, and C(h) - C(h/4) is 15/16 B h^2/6 plus noise. Numerical Recipes
(3rd ed., 5.7) has the balance of the two errors for functions of one variable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Difference = Literal["auto", "forward", "central"]
Product = Literal["forget", "retain", "penalty"]
"""H_f u, H_r w, and the penalty's product."""

START = 2.0**-11
"""Relative step at which a run's first check begins."""
SHORTEST, LONGEST = 2.0**-27, 2.0**-4
WALKS = 4
"""How often a check may move its pair of steps; each move is two passes."""
FORWARD_ENOUGH = 5e-3
"""`auto` takes forward differences where their relative error is estimated below this. The bound to keep is 2 %; the
rest is for what changes until the next check."""
GOOD = 1e-3
"""Relative error below which a check does not look for a longer step."""
DRIFT = 4.0
"""Change of |g| that asks for a check before its time."""
# Variances of noise in units of sigma^2, of independent passes: S(h); S(h/4) - S(h)/16, where g enters both;
# C(h) - C(h/4) in units of (sigma / h)^2.
_S, _N, _D = 6.0, 6.0 - 8.0 / 16 + 6.0 / 256, 0.5 * (1 + 16)
_SEEN = 3.0
"""Share of the noise's variance by which a square has to exceed it to count as seen: noise itself grows a little with
the step."""


@dataclass
class Step:
    """How one product is differenced since its last check."""

    relative: float
    """|displacement| / |theta|."""
    central: bool
    error: float
    """Estimated norm of the error of H v for |v| = 1."""
    probe: float
    """The longer relative step of the last check."""
    gradient: float
    """|g| at the last check."""
    round: int
    """Round of the last check."""


class Steps:
    """The steps of all products of a run: its state, the same on every rank."""

    def __init__(self, difference: Difference = "auto", check_every: int = 20):
        self.difference, self.check_every = difference, check_every
        self.round = 0
        self.products: dict[Product, Step] = {}

    def due(self, product: Product, gradient: float) -> bool:
        """Whether the product has to be checked; `gradient`: the norm of the gradient at theta."""
        step = self.products.get(product)
        if step is None or self.round - step.round >= self.check_every:
            return True
        return not step.gradient / DRIFT <= gradient <= step.gradient * DRIFT and math.isfinite(gradient)

    def state_dict(self) -> dict[str, Any]:
        return {product: asdict(step) for product, step in self.products.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.products = {product: Step(**step) for product, step in state.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class StepEstimate:
    """What a pair of steps h and h/4 says about differences along one direction."""

    step: float
    """h, absolute."""
    product: float
    """|Hv| by the shorter step."""
    sigma: float
    """Noise of a gradient."""
    first: float
    """|A| / 2: forward differences err by it times h."""
    second: float
    """|B| / 6: central differences err by it times h^2."""
    first_seen: bool
    second_seen: bool
    apart: float
    """|C(h) - C(h/4)|."""

    @classmethod
    def of(cls, step: float, sums: list[float], gradient: float, eps: float) -> StepEstimate:
        """From (S,S), (S,S'), (S',S'), (D,D), (D,D'), (D',D'), where D = 2hC and a prime marks h/4."""
        ss, sx, xx, dd, dx, yy = sums
        noise = max(0.0, xx - sx / 8 + ss / 256)
        sigma = max(math.sqrt(noise / _N), 0.1 * eps * gradient)
        curved = ss - _S * sigma**2
        apart = max(0.0, dd - 8 * dx + 16 * yy) / (4 * step**2)
        bent, floor = apart - _D * (sigma / step) ** 2, (0.25 * sigma / step) ** 2
        return cls(
            step,
            product=2 * math.sqrt(yy) / step,
            sigma=sigma,
            first=math.sqrt(max(curved, _SEEN * _S * sigma**2)) / (2 * step**2),
            second=math.sqrt(max(bent, floor)) * 16 / 15 / step**2,
            first_seen=curved > _SEEN * _S * sigma**2,
            second_seen=bent > _SEEN * _D * (sigma / step) ** 2,
            apart=math.sqrt(apart),
        )

    def error(self, central: bool, step: float) -> float:
        """Norm of the error of Hv."""
        if central:
            return math.hypot(self.second * step**2, self.sigma / (math.sqrt(2) * step))
        return math.hypot(self.first * step, math.sqrt(2) * self.sigma / step)

    def best(self, central: bool) -> float:
        """The step of least error (infinite where nothing is curved or rounded)."""
        if central:
            return (self.sigma / (2 * self.second)) ** (1 / 3) if self.second > 0 else math.inf
        return math.sqrt(math.sqrt(2) * self.sigma / self.first) if self.first > 0 else math.inf

    def central(self, difference: Difference) -> bool:
        """Whether to take central differences."""
        if difference != "auto":
            return difference == "central"
        forward = self.best(False)
        return math.isfinite(forward) and self.error(False, forward) > FORWARD_ENOUGH * self.product

    def move(self, difference: Difference) -> int:
        """+1: the pair should be four times as long, -1: a quarter, 0: it tells enough."""
        central = self.central(difference)
        if self.second_seen and self.apart > 0.1 * self.product:  # beyond the series' reach: no estimate holds
            return -1
        if not (self.second_seen if central else self.first_seen):
            return int(self.error(central, self.step) > GOOD * self.product)
        if not central:
            return 0
        best = self.best(True)
        return int(best > 2 * self.step) - int(best < self.step / 8)
