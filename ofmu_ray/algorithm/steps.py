"""Step lengths for differences of gradients, and the error of the resulting difference.

Along a unit direction v, the gradient at a displacement h is g + h Hv + h^2 A/2 + h^3 B/6 + noise of norm sigma (the
rounding of a pass). The errors are then

    forward   (g(h) - g) / h           |A| h / 2    and  sqrt(2) sigma / h
    central   (g(h) - g(-h)) / 2h      |B| h^2 / 6  and  sigma / (sqrt(2) h)

Gradients at h, -h, h/4 and -h/4 determine |A|, |B| and sigma. With S(h) = g(h) + g(-h) - 2g = A h^2 + noise and C(h)
the central difference, S(h/4) - S(h)/16 is pure noise, and C(h) - C(h/4) is 15/16 B h^2/6 plus noise. Numerical Recipes
(3rd ed., 5.7) balances the two errors for functions of one variable.

Where h is too long for the series, what looks like noise is curvature. It is larger than rounding usually is, and
larger than the noise very close to theta.
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
"""Relative step at which a run's first check starts."""
SHORTEST, LONGEST = 2.0**-27, 2.0**-4
WALKS = 8
"""How often a check may move its pair of steps; each move is two passes."""
CLOSE = 2.0**-25
"""Relative step at which S(h) is only rounding."""
ROUNDING = 1e-3
"""Noise beyond this share of |g| may not be rounding. On the cases of benchmarks/difference_error.py rounding in fp32
was 5e-7 to 7e-5, and more than 3e-3 came from steps that were too long. Where |g| is tiny it is rounding: `CLOSE`
tells."""
GROWTH = 16.0
"""Rounding is at most so much larger at a long step than at `CLOSE`."""
ENOUGH = 5e-3
"""`auto` takes forward differences if their estimated relative error is below this; central ones may have so much
noise. The bound is 2 %; the margin covers changes until the next check."""
GOOD = 1e-3
"""Below this relative error, a check does not try a longer step."""
DRIFT = 4.0
"""A change of |g| by this factor triggers an early check."""
BENT = 0.2
"""|S| / |2hC| beyond which a central difference is off by more than about 1 % (SmolLM2-135M: a fifth of its square)."""
# Noise variances of independent passes in units of sigma^2: S(h); S(h/4) - S(h)/16, where g enters both;
# C(h) - C(h/4) in units of (sigma / h)^2.
_S, _N, _D = 6.0, 6.0 - 8.0 / 16 + 6.0 / 256, 0.5 * (1 + 16)
_SEEN = 3.0
"""A square counts as seen if it exceeds the noise variance by this multiple: noise itself grows a little with the
step."""


@dataclass
class Step:
    """How a product is differenced since its last check."""

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
    bend: float = 0.0
    """|S| / |2hC| at the last check."""

    def too_long(self, bent: float, difference: float) -> bool:
        """Whether curvature has grown since the last check; from |S|^2 and |2hC|^2 at this step, with no extra pass.

        False if one is not a number: the round reports that.
        """
        return bent > max(BENT, 2 * self.bend) ** 2 * difference


class Steps:
    """The steps of all products of a run. The same on every rank."""

    def __init__(self, difference: Difference = "auto", check_every: int = 20):
        self.difference, self.check_every = difference, check_every
        self.round = 0
        self.products: dict[Product, Step] = {}

    def due(self, product: Product, gradient: float) -> bool:
        """Whether the product is due for a check; `gradient`: the norm of the gradient at theta."""
        step = self.products.get(product)
        if step is None or self.round - step.round >= self.check_every:
            return True
        return not step.gradient / DRIFT <= gradient <= step.gradient * DRIFT and math.isfinite(gradient)

    def state_dict(self) -> dict[str, Any]:
        return {product: asdict(step) for product, step in self.products.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.products = {product: Step(**step) for product, step in state.items()}  # type: ignore[misc]


def noise_of(square: float) -> float:
    """sigma, from (S,S) where S is only noise."""
    return math.sqrt(max(square, 0.0) / _S)


@dataclass(frozen=True)
class StepEstimate:
    """What a pair of steps h and h/4 shows about differences along one direction."""

    step: float
    """h, absolute."""
    product: float
    """|Hv| from the shorter step."""
    sigma: float
    """Noise of a gradient."""
    first: float
    """|A| / 2: times h, the error of forward differences."""
    second: float
    """|B| / 6: times h^2, the error of central differences."""
    first_seen: bool
    second_seen: bool
    apart: float
    """|C(h) - C(h/4)|."""
    rough: bool
    """The noise is beyond what rounding usually makes."""

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
            rough=sigma > ROUNDING * gradient,
        )

    def error(self, central: bool, step: float) -> float:
        """Norm of the error of Hv."""
        if central:
            return math.hypot(self.second * step**2, self.sigma / (math.sqrt(2) * step))
        return math.hypot(self.first * step, math.sqrt(2) * self.sigma / step)

    def bend(self, step: float) -> float:
        """|S| / |2hC| at this step: half the second-order part of g beside the first-order part, and noise."""
        if not self.product:
            return math.inf
        return math.hypot(self.first * step, math.sqrt(_S) / 2 * self.sigma / step) / self.product

    def best(self, central: bool) -> float:
        """The step with the least error (infinite without curvature or rounding)."""
        if central:
            return (self.sigma / (2 * self.second)) ** (1 / 3) if self.second > 0 else math.inf
        return math.sqrt(math.sqrt(2) * self.sigma / self.first) if self.first > 0 else math.inf

    def safe(self, central: bool) -> float:
        """A step for the rounds until the next check, in which |B| may grow by an order of magnitude: central ones are
        up to four times shorter than the best, as far as the noise allows.

        But not shorter than h/4, unless the best one is: weights in fp32 round a short displacement, by the same at h
        and -h, so no sum of gradients shows it.
        """
        best = self.best(central)
        if not central or not self.product:
            return best
        return min(best, max(best / 4, self.step / 4, self.sigma / (math.sqrt(2) * ENOUGH * self.product)))

    def central(self, difference: Difference) -> bool:
        """Whether to take central differences."""
        if difference != "auto":
            return difference == "central"
        forward = self.best(False)
        return math.isfinite(forward) and self.error(False, forward) > ENOUGH * self.product

    def move(self, difference: Difference, rounding: float) -> int:
        """+1: the pair should be four times as long; -1: a quarter as long; 0: it is good enough.

        `rounding`: the noise at `CLOSE`; only needed if the estimate is `rough`.
        """
        central = self.central(difference)
        beyond = self.rough and self.sigma > GROWTH * rounding
        if beyond or (self.second_seen and self.apart > 0.1 * self.product):  # the series does not reach
            return -1
        if not (self.second_seen if central else self.first_seen):
            return int(self.error(central, self.step) > GOOD * self.product)
        if not central:
            return 0
        best = self.best(True)
        return int(best > 2 * self.step) - int(best < self.step / 8)
