"""A sweep's trials and settings as its report needs them: which counts, which way is better, what was spent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ofmu_ray.attacks.importance import Importance, importances
from ofmu_ray.metrics.degeneration import Sound
from ofmu_ray.metrics.fronts import Trial, number_of
from ofmu_ray.metrics.registry import metric
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.reporting import figures

WITHOUT_RESULT = ("failed", "stopped")
"""Statuses of trials whose figures, if any, are those of an evaluation on the way."""


@dataclass(frozen=True)
class Axis:
    """How the objective is drawn."""

    label: str
    log: bool
    falling: bool
    """Low is better: drawn upside down, so that up is better everywhere."""
    reference: float | None
    """The retrained model's figure, where the distance to it is what counts."""

    def place(self, value: float) -> float:
        """Where a figure stands on the axis."""
        value = value if self.reference is None else abs(value - self.reference)
        return max(value, 1e-300) if self.log else value


@dataclass(frozen=True)
class Spent:
    """What some trials cost in all."""

    trials: int
    flops: float
    train_seconds: float
    total_seconds: float
    saved_flops: float
    """What the trials that ended early would have cost besides, at the same cost per evaluation."""


class Sweep:
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
        self.early: Mapping[str, Any] = self.search.get("early") or {}
        self.space: Sequence[Mapping[str, Any]] = settings.get("space") or ()
        self.objective = str(self.rule.get("objective") or "forget_quality")
        self.utility = str(self.rule.get("utility") or "model_utility")
        self.floor: float | None = self.rule.get("floor")
        self.chosen: Mapping[str, Any] | None = settings.get("chosen")
        self._last = {row["number"]: row for row in sorted(stages, key=lambda row: int(row["stage"]))}

    @cached_property
    def goal(self) -> Goal:
        """The rule with its numbers."""
        sound = self.rule.get("sound")
        aim = self.reference("retrained", self.objective)
        return Goal(self.objective, self.utility, self.floor, aim, sound and Sound(**sound))

    @property
    def whole(self) -> list[Trial]:
        """Trials that came to their end with both figures of the rule."""
        return [
            trial
            for trial in self.trials
            if trial.get("status") not in WITHOUT_RESULT
            and number_of(trial, self.objective) is not None
            and number_of(trial, self.utility) is not None
        ]

    @property
    def enough(self) -> list[Trial]:
        """Of these, the ones whose utility reaches the floor and that are not degenerate."""
        return [trial for trial in self.whole if self.goal.eligible(trial)]

    @property
    def nearest(self) -> Trial | None:
        """Where no trial may be chosen, the first in the rule's order."""
        number = self.settings.get("nearest")
        if number is None and self.chosen is not None and self.chosen.get("floor_missed"):
            number = self.chosen["number"]
        return next((trial for trial in self.trials if trial["number"] == number), None)

    @property
    def recommended(self) -> Trial | None:
        """The chosen trial, unless it misses the floor."""
        if self.chosen is None or self.chosen.get("floor_missed"):
            return None
        return next((trial for trial in self.trials if trial["number"] == self.chosen["number"]), None)

    def reference(self, model: str, name: str) -> float | None:
        """A figure of the target or the retrained model on the rows that trials are judged on."""
        found = ((self.settings.get("references") or {}).get(model) or {}).get(name) or {}
        return number_of(found, "value")

    def last(self, trial: Trial, name: str) -> float | None:
        """A trial's figure, or what it was at its last evaluation on the way."""
        value = number_of(trial, name)
        return value if value is not None else number_of(self._last.get(trial["number"], {}), name)

    @cached_property
    def axis(self) -> Axis:
        """The objective's axis."""
        label, kind = noun(self.objective), metric(self.objective).better
        if kind == "retrained":
            reference = self.reference("retrained", self.objective)
            words = label if reference is None else f"distance of {label} to the retrained model's"
            return Axis(f"{words}, low is better", False, True, reference)
        values = [value for trial in self.trials if (value := self.last(trial, self.objective)) is not None]
        log = bool(values) and min(values) >= 0 and max(values) > 100 * max(min(values), 1e-300)
        if log and self.objective.endswith("forget_quality"):
            return Axis(f"{label} (p-value, log axis)", True, False, None)
        return Axis(f"{label}, low is better" if kind == "low" else label, False, kind == "low", None)

    def spent(self, trials: Sequence[Trial]) -> Spent:
        """What the trials cost, counting those that failed as far as they came."""
        flops, train, total = (
            math.fsum(number_of(trial, name) or 0.0 for trial in trials)
            for name in ("flops", "train_seconds", "total_seconds")
        )
        # a population's member that is replaced goes on as a copy of another one: nothing is saved
        saved = 0.0 if self.search.get("kind") == "population" else math.fsum(map(_rest, trials))
        return Spent(len(trials), flops, train, total, saved)

    @cached_property
    def importances(self) -> dict[str, list[Importance]]:
        """Figure of the rule -> importance of each option; empty with too few trials."""
        found = {}
        drawn = [options(trial) for trial in self.whole]
        goodness = {
            self.objective: [float(self.goal.goodness(trial) or 0.0) for trial in self.whole],
            self.utility: [float(trial[self.utility]) for trial in self.whole],
        }
        for name, values in goodness.items():
            rows = importances(drawn, values, self.space)
            if rows is not None:
                found[name] = rows
        return found


def options(trial: Trial) -> dict[str, Any]:
    """Dotted field -> value."""
    found: dict[str, Any] = json.loads(trial.get("options") or "{}")
    return found


def _rest(trial: Trial) -> float:
    """FLOPs that an ended trial did not spend."""
    done, planned = number_of(trial, "stage"), number_of(trial, "stages")
    if trial.get("status") != "stopped" or not done or not planned:
        return 0.0
    return (number_of(trial, "flops") or 0.0) * max(planned / done - 1.0, 0.0)


def short(field: str, space: Sequence[Mapping[str, Any]]) -> str:
    """A field without the section that all fields of the space share: ofmu.inner.lr -> inner.lr."""
    heads = {str(knob["field"]).partition(".")[0] for knob in space}
    return field.partition(".")[2] if len(heads) == 1 and "." in field else field


def value_words(value: Any) -> str:
    """A value of an option."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value)


def noun(name: str) -> str:
    """A figure's label within a sentence: model utility, KS distance to retrained."""
    label = figures.label(name)
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]
