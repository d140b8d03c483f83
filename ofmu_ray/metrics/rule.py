"""The one rule of benchmarks and sweeps: the best objective among the models with enough utility whose generations are
sound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ofmu_ray.errors import UserError
from ofmu_ray.metrics.degeneration import SoundRange, failed_measures
from ofmu_ray.metrics.fronts import Trial, number_of
from ofmu_ray.metrics.registry import metric, turned

SMALLEST_P = 1e-300
FAILED = -2.0
"""Score of a run without metrics: below all others."""


@dataclass(frozen=True)
class Goal:
    """The rule with its numbers, for models that are judged on the same rows."""

    objective: str
    utility: str
    floor: float | None
    """Lowest utility, in units of the metric; None: any."""
    retrained_objective: float | None = None
    """The retrained model's objective, for metrics that should match it; None: there is none."""
    sound: SoundRange | None = None
    """Generations beside which a model's are degenerate; None: no model is."""
    margin: float = 0.0
    """Added to the floor when a trial is chosen, in units of the metric, if some trial that is not degenerate reaches
    that."""

    def goodness(self, metrics: Mapping[str, Any]) -> float | None:
        """The objective so that more is better, in units of the metric; None where it is absent.

        Raises:
            UserError: nobody can tell which way is better: it is not declared, or the retrained model is missing.
        """
        value = number_of(metrics, self.objective)
        if value is None:
            return None
        goodness = turned(metric(self.objective), value, self.retrained_objective)
        if isinstance(goodness, str):
            raise UserError(f"{self.objective}: {goodness}")
        return goodness

    def enough(self, metrics: Mapping[str, Any]) -> bool | None:
        """Whether the utility reaches the floor; None where it is absent."""
        value = number_of(metrics, self.utility)
        return None if value is None else self.floor is None or value >= self.floor

    def degenerate(self, metrics: Mapping[str, Any]) -> bool | None:
        """Whether the answers to forget prompts are worse than sound ones; None where that is not known."""
        failed = failed_measures(metrics, self.sound)
        return None if failed is None else bool(failed)

    def eligible(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the rule recommends such a model, if it has no better one: enough utility, and not degenerate."""
        return bool(self.enough(metrics)) and not self.degenerate(metrics)

    def choosing(self, trials: Sequence[Mapping[str, Any]]) -> Goal:
        """The rule for choosing among these: with the margin, if one of them that it recommends reaches that."""
        if not self.margin or self.floor is None:
            return self
        strict = replace(self, floor=self.floor + self.margin, margin=0.0)
        reached = any(strict.eligible(one) for one in trials if strict.goodness(one) is not None)
        return strict if reached else replace(self, margin=0.0)

    def rank(self, metrics: Mapping[str, Any]) -> tuple[bool, bool, float, float] | None:
        """Place in the rule's order, lowest first; None where a metric is absent.

        Degenerate models come last; then those without enough utility, by utility; the others by their objective.
        """
        goodness, utility = self.goodness(metrics), number_of(metrics, self.utility)
        if goodness is None or utility is None:
            return None
        missed = not self.enough(metrics)
        return bool(self.degenerate(metrics)), missed, -utility if missed else -goodness, -goodness

    def height(self, metrics: Mapping[str, Any]) -> float | None:
        """The objective on a scale from 0 to 1 whose order is that of `goodness`; p-values by their logarithm."""
        goodness = self.goodness(metrics)
        if goodness is None:
            return None
        if metric(self.objective).p_value:
            return 1 - math.log10(max(goodness, SMALLEST_P)) / math.log10(SMALLEST_P)
        return 0.5 + _squashed(goodness) / 2

    def score(self, metrics: Mapping[str, Any], share: float = 1.0) -> float:
        """One number whose order is that of `rank`: in [0, 1] with enough utility, in [-1, 0) without, in (-2, -1) for
        degenerate models, else FAILED.

        Bounded, because schedulers interpolate between scores. `share` of the floor is enough.
        """
        height, utility = self.height(metrics), number_of(metrics, self.utility)
        if height is None or utility is None:
            return FAILED
        missing = 0.0 if self.floor is None else share * self.floor - utility
        score = height if missing <= 0 else -_squashed(missing)
        return 0.49 * score - 1.5 if self.degenerate(metrics) else score


@dataclass(frozen=True)
class Choice:
    """The trial whose options a method's reported runs use."""

    trial: Trial
    floor_missed: bool = False
    """No trial had enough utility, and this one came nearest."""
    degenerate: bool = False
    """All trials were degenerate."""


def select(trials: Sequence[Trial], goal: Goal) -> Choice | None:
    """The first of the tuning trials in the rule's order; None: no tuning trial has both metrics.

    `trials`: of one method and split. Ties, which are common (on n rows the KS distance is a multiple of 1/n): more
    utility, then fewer FLOPs, then the lower trial number.
    """

    def tie(trial: Trial) -> tuple[float, float, int]:
        flops, utility = number_of(trial, "flops"), number_of(trial, goal.utility)
        return -(utility or 0.0), math.inf if flops is None else flops, int(trial.get("trial") or 0)

    goal = goal.choosing([trial for trial in trials if trial.get("phase") == "tune"])
    ranked = [
        (rank, tie(trial), trial)
        for trial in trials
        if trial.get("phase") == "tune" and (rank := goal.rank(trial)) is not None
    ]
    if not ranked:
        return None
    (degenerate, missed, *_), _, trial = min(ranked, key=lambda place: place[:2])
    return Choice(trial, floor_missed=missed, degenerate=degenerate)


def _squashed(value: float) -> float:
    """(-inf, inf) -> (-1, 1), rising, 0 at 0."""
    return 2 / math.pi * math.atan(value)
