"""What a search is after, as one rule: the best objective among the models with enough utility."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ofmu_ray.evaluation.comparison import number_of

Sense = Literal["high", "low", "retrained"]
SMALLEST_P = 1e-300
FAILED = -2.0
"""Score of a run without figures: below all others."""

_DEGENERATION = ("_empty", "_repetition", "_length", "_ngram_entropy")


def sense(name: str) -> Sense:
    """Which way a figure is better. What forget rows score should be what a model scores that never saw them."""
    if name.endswith(("ks_statistic", "_variance")):
        return "low"
    if name.endswith("forget_quality"):
        return "high"
    return "retrained" if name.startswith(("forget_", "mia_", "privleak")) or name.endswith(_DEGENERATION) else "high"


@dataclass(frozen=True)
class Goal:
    """The rule with its numbers, for models that are judged on the same rows."""

    objective: str
    utility: str
    floor: float | None
    """Lowest utility, in units of the figure; None: any."""
    retrained_objective: float | None = None
    """The retrained model's objective, for figures that should match it; None: these are to be low."""

    def goodness(self, figures: Mapping[str, Any]) -> float | None:
        """The objective so that more is better, in units of the figure; None where it is absent."""
        value = number_of(figures, self.objective)
        if value is None:
            return None
        kind = sense(self.objective)
        if kind == "high":
            return value
        if kind == "low" or self.retrained_objective is None:
            return -value
        return -abs(value - self.retrained_objective)

    def enough(self, figures: Mapping[str, Any]) -> bool | None:
        """Whether the utility reaches the floor; None where it is absent."""
        value = number_of(figures, self.utility)
        return None if value is None else self.floor is None or value >= self.floor

    def height(self, figures: Mapping[str, Any]) -> float | None:
        """The objective on a scale from 0 to 1 whose order is that of `goodness`; p-values by their logarithm."""
        goodness = self.goodness(figures)
        if goodness is None:
            return None
        if self.objective.endswith("forget_quality"):
            return 1 - math.log10(max(goodness, SMALLEST_P)) / math.log10(SMALLEST_P)
        return 0.5 + _squashed(goodness) / 2

    def score(self, figures: Mapping[str, Any], share: float = 1.0) -> float:
        """One number whose order is that of the rule: in [0, 1] with enough utility, in [-1, 0) without, else FAILED.

        Bounded, because schedulers interpolate between scores. `share` of the floor is enough.
        """
        height, utility = self.height(figures), number_of(figures, self.utility)
        if height is None or utility is None:
            return FAILED
        missing = 0.0 if self.floor is None else share * self.floor - utility
        return height if missing <= 0 else -_squashed(missing)


def _squashed(value: float) -> float:
    """(-inf, inf) -> (-1, 1), rising, 0 at 0."""
    return 2 / math.pi * math.atan(value)
