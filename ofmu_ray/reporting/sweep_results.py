"""A sweep's trials and settings as its report needs them: which trials count, which way is better, the cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ofmu_ray.attacks.importance import Importance, importances
from ofmu_ray.metrics.degeneration import SoundRange
from ofmu_ray.metrics.fronts import Trial, number_of
from ofmu_ray.metrics.registry import metric
from ofmu_ray.metrics.rule import Goal

WITHOUT_RESULT = ("failed", "stopped")
"""Statuses of trials whose metrics, if any, come from an intermediate evaluation."""


@dataclass(frozen=True)
class Axis:
    """How the objective is drawn."""

    label: str
    log: bool
    falling: bool
    """Low is better: drawn upside down, so that up is always better."""
    reference: float | None
    """The retrained model's value, or 0, if the distance to it is what counts."""

    def place(self, value: float) -> float:
        """A value's position on the axis."""
        value = value if self.reference is None else abs(value - self.reference)
        return max(value, 1e-300) if self.log else value


class SweepData:
    """The trials of a sweep under its rule."""

    def __init__(
        self, trials: Sequence[Trial], stages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> None:
        self.settings = settings
        self.all = list(trials)
        self.trials = [trial for trial in trials if trial.get("phase") != "confirm"]
        self.fresh = [trial for trial in trials if trial.get("phase") == "confirm"]
        self.rule: Mapping[str, Any] = settings.get("rule") or {}
        self.search: Mapping[str, Any] = settings.get("search") or {}
        self.space: Sequence[Mapping[str, Any]] = settings.get("space") or ()
        self.objective = str(self.rule.get("objective") or "forget_quality")
        self.utility = str(self.rule.get("utility") or "model_utility")
        self.floor: float | None = self.rule.get("floor")
        self.chosen: Mapping[str, Any] | None = settings.get("chosen")
        sound, aim = self.rule.get("sound"), self.reference("retrained", self.objective)
        margin = float(self.rule.get("margin") or 0.0)
        self.goal = Goal(self.objective, self.utility, self.floor, aim, sound and SoundRange(**sound), margin)
        last = {row["number"]: row for row in sorted(stages, key=lambda row: int(row["stage"]))}
        self._last: Mapping[int, Mapping[str, Any]] = last

    @cached_property
    def choosing(self) -> Goal:
        """The rule as it chose among the trials: with the margin, if one of them reaches that."""
        return self.goal.choosing([t for t in self.trials if t.get("status") not in WITHOUT_RESULT])

    @cached_property
    def completed(self) -> list[Trial]:
        """Completed trials with both metrics of the rule, in its order."""
        trials = [t for t in self.trials if t.get("status") not in WITHOUT_RESULT and self.goal.rank(t) is not None]
        by_cost = self.rule.get("tie_break") == "cost"

        def place(trial: Trial) -> Any:
            return self.choosing.rank(trial), (number_of(trial, "flops") or 0.0) if by_cost else 0.0, trial["number"]

        return sorted(trials, key=place)

    @property
    def enough(self) -> list[Trial]:
        """Those completed trials that the rule could choose: with enough utility, and not degenerate."""
        return [trial for trial in self.completed if self.choosing.eligible(trial)]

    @property
    def recommended(self) -> Trial | None:
        """The chosen trial, unless it misses the floor."""
        missed = self.chosen is None or self.chosen.get("floor_missed")
        return None if missed or self.chosen is None else self._numbered(self.chosen["number"])

    @property
    def nearest(self) -> Trial | None:
        """The first trial in the rule's order, if no trial may be chosen."""
        number = self.settings.get("nearest")
        if number is None and self.chosen is not None and self.chosen.get("floor_missed"):
            number = self.chosen["number"]
        return self._numbered(number)

    def _numbered(self, number: int | None) -> Trial | None:
        return next((trial for trial in self.trials if trial["number"] == number), None)

    def spans(self, trial: Trial, other: Trial) -> bool:
        """Whether the trial's interval of the objective contains the other's value."""
        low, high = (number_of(trial, f"{self.objective}_{end}") for end in ("low", "high"))
        return low is not None and high is not None and low <= float(other[self.objective]) <= high

    def reference(self, model: str, name: str) -> float | None:
        """A metric of the target or the retrained model on the rows that trials are judged on."""
        return number_of(((self.settings.get("references") or {}).get(model) or {}).get(name) or {}, "value")

    @cached_property
    def axis(self) -> Axis:
        """The objective's axis; logarithmic for p-values that span more than two decades."""
        label, kind = noun(self.objective), metric(self.objective).better
        reference = self.reference("retrained", self.objective)
        if kind == "retrained" and reference is not None:
            return Axis(f"distance of {label} to the retrained model's, low is better", False, True, reference)
        if kind == "zero":
            return Axis(f"distance of {label} to 0, low is better", False, True, 0.0)
        values = [float(trial[self.objective]) for trial in self.all if number_of(trial, self.objective) is not None]
        if metric(self.objective).p_value and values and max(values) > 100 * max(min(values), 1e-300):
            return Axis(f"{label} (p-value, log axis)", True, False, None)
        low = "low" in (kind, metric(self.objective).alone)
        return Axis(f"{label}, low is better" if low else label, False, low, None)

    def place(self, trial: Trial) -> tuple[float, float] | None:
        """A trial's position in the plane, at its last evaluation if it did not complete."""
        # a fresh seed has the chosen trial's number, but none of its evaluations
        last = {} if trial.get("phase") == "confirm" else self._last.get(trial["number"], {})
        names = (self.utility, self.objective)
        return self._place(*(number_of(last if trial.get(name) is None else trial, name) for name in names))

    def reference_place(self, model: str) -> tuple[float, float] | None:
        """The same for the target or the retrained model."""
        return self._place(*(self.reference(model, name) for name in (self.utility, self.objective)))

    def _place(self, x: float | None, y: float | None) -> tuple[float, float] | None:
        return None if x is None or y is None else (x, self.axis.place(y))

    def flops(self) -> tuple[float, float]:
        """FLOPs spent on all trials, and those saved by stopping trials early (assuming equal cost per evaluation).

        Failed trials count as far as they ran.
        """
        spent = math.fsum(number_of(trial, "flops") or 0.0 for trial in self.all)
        # a replaced member of a population continues as a copy of another: nothing is saved
        early = [trial for trial in self.trials if trial.get("status") == "stopped" and trial.get("stage")]
        rests = [(trial.get("flops") or 0.0) * (trial["stages"] / trial["stage"] - 1.0) for trial in early]
        return spent, 0.0 if self.search.get("kind") == "population" else math.fsum(rests)

    @cached_property
    def importances(self) -> dict[str, list[Importance]]:
        """Metric of the rule -> importance of each option, largest first; empty with too few trials."""
        trials = sorted(self.completed, key=lambda trial: int(trial["number"]))
        goodness = {
            self.objective: [float(self.goal.goodness(trial) or 0.0) for trial in trials],
            self.utility: [float(trial[self.utility]) for trial in trials],
        }
        drawn = [options(trial) for trial in trials]
        by_metric = {name: importances(drawn, values, self.space) for name, values in goodness.items()}
        return {name: rows for name, rows in by_metric.items() if rows is not None}


def options(trial: Trial) -> dict[str, Any]:
    """Dotted field -> value."""
    values: dict[str, Any] = json.loads(trial.get("options") or "{}")
    return values


def short(field: str, space: Sequence[Mapping[str, Any]]) -> str:
    """A field without the section that all fields of the space share: ofmu.inner.lr -> inner.lr."""
    heads = {str(knob["field"]).partition(".")[0] for knob in space}
    return field.partition(".")[2] if len(heads) == 1 and "." in field else field


def noun(name: str) -> str:
    """A metric's label within a sentence: model utility, KS distance to retrained."""
    return metric(name).noun
