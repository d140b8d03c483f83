"""The results of a benchmark as numbers: means, intervals, paired tests, points of the plane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics.fronts import Trial, geometric_mean, number_of
from ofmu_ray.metrics.intervals import MetricValue, over_seeds
from ofmu_ray.metrics.paired import ResampledRun, Resamples, Result, Verdict, tested, turned_draws, verdicts
from ofmu_ray.metrics.registry import Metric, metric, metrics
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.reporting.benchmark_settings import BenchmarkSettings

REFERENCES = ("target", "retrained")


@dataclass(frozen=True)
class Summary:
    """A method's metric over its reported seeds."""

    over_seeds: MetricValue
    """Mean (of p-values: geometric, without interval) with the t interval over seeds."""
    values: dict[int, float]
    """Seed -> the run's value."""
    over_rows: tuple[float, float] | None = None
    """95 % interval of the mean over rows, at these seeds."""


@dataclass(frozen=True)
class SplitResults:
    """Everything about one split."""

    split: str
    methods: list[str]
    runs: dict[str, list[dict[str, Any]]]
    """Method -> reported runs."""
    summaries: dict[str, dict[str, Summary]]
    """Metric -> method."""
    verdicts: dict[str, dict[str, Verdict]]
    """Metric -> method; empty for metrics that are not tested."""
    references: dict[str, dict[str, ResampledRun]]
    """target, retrained -> metric -> value."""
    target_utility: float | None
    missed: set[str]
    """Methods whose mean utility over the reported seeds is below the floor, or that have none."""
    degenerate: set[str]
    """Methods with more than half of their reported runs degenerate."""
    mismatches: list[str] = field(default_factory=list)
    """Runs whose recorded values differ from those computed from their rows."""


class BenchmarkData:
    """The input of a report, looked up by split, method and phase."""

    def __init__(
        self,
        trials: pa.Table | Sequence[Mapping[str, Any]],
        rows: pa.Table | Sequence[Mapping[str, Any]],
        settings: BenchmarkSettings,
    ) -> None:
        self.trials: list[dict[str, Any]] = [
            dict(trial) for trial in (trials.to_pylist() if isinstance(trials, pa.Table) else trials)
        ]
        self.settings = settings
        self.objective, self.utility, self.floor = settings.objective, settings.utility, settings.floor
        self.splits = list(dict.fromkeys(str(trial["split"]) for trial in self.trials))
        columns = dict.fromkeys(name for trial in self.trials for name in trial)
        measured = [name for name in columns if f"{name}_low" in columns]
        first = [one.name for one in metrics() if one.first and one.name in measured]
        self.metrics = [*first, *(name for name in measured if not metric(name).first)]
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([dict(row) for row in rows])
        self._tables, self._tuning_rows = _tables(table)
        self._resamples: dict[str, Resamples | None] = {}
        self._draws: dict[tuple[str, str, int | None, str], ResampledRun | str] = {}

    @property
    def scored(self) -> Metric | None:
        """The metric of forgetting that plots show as a score: the one that the objective is tested by, or the first
        of the tables that has a score."""
        names = [metric(self.objective).compared, *(name for name in self.metrics if metric(name).forgetting)]
        return next((metric(name) for name in names if name in self.metrics and metric(name).span is not None), None)

    @property
    def has_retrained(self) -> bool:
        """Whether a split has a retrained model."""
        return any(model == "retrained" for _, model, _ in self._tables)

    def methods(self, split: str) -> list[str]:
        """Methods of a split in the order they ran, without the ablation's variants."""
        return list(dict.fromkeys(t["method"] for t in self.trials if t["split"] == split and t["phase"] != "ablation"))

    def runs(self, split: str, method: str, *phases: str) -> list[dict[str, Any]]:
        """Runs of a method on a split, by phase and number."""
        runs = [t for t in self.trials if (t["split"], t["method"]) == (split, method) and t["phase"] in phases]
        return sorted(runs, key=lambda t: (phases.index(t["phase"]), t.get("trial") or 0, t.get("seed") or 0))

    def resamples(self, split: str) -> Resamples | None:
        """The resamples of rows, shared by everything on the split; None if no rows are known."""
        if split not in self._resamples:
            known = [self._tables.get((split, model, None)) for model in reversed(REFERENCES)]
            known += [table for (owner, _, _), table in self._tables.items() if owner == split]
            table = next((table for table in known if table is not None), None)
            samples = self.settings.samples
            self._resamples[split] = None if table is None else Resamples(table, samples=samples)
        return self._resamples[split]

    def resampled_metric(self, split: str, method: str, seed: int | None, name: str) -> ResampledRun | str:
        """A metric of a run, or of a reference model (no seed), from its rows; or why there is none."""
        key = split, method, seed, name
        if key not in self._draws:
            resamples, table = self.resamples(split), self._tables.get((split, method, seed))
            retrained = self._tables.get((split, "retrained", None))
            known = resamples is not None and table is not None
            self._draws[key] = resamples.resampled_run(name, table, retrained) if resamples and known else "no rows"
        return self._draws[key]

    def reference(self, split: str, model: str) -> dict[str, ResampledRun]:
        """Metrics of the target or the retrained model from its rows (forget quality by its KS statistic)."""
        names = dict.fromkeys(
            name for name in (*self.metrics, self.utility) if metric(name).paired and not metric(name).tested_as
        )
        resampled = {name: self.resampled_metric(split, model, None, name) for name in names}
        return {name: draws for name, draws in resampled.items() if isinstance(draws, ResampledRun)}

    def target_utility(self, split: str, phase: str = "report") -> float | None:
        """The target's utility on the rows that the phase's runs are judged on; None if its rows are not known."""
        target = self._tables.get((split, "target", None))
        if phase == "tune" and split in self._tuning_rows and target is not None:
            ids = zip(target["set"].to_pylist(), target["index"].to_pylist(), strict=True)
            cut = target.filter(pa.array([row in self._tuning_rows[split] for row in ids]))
            draws = Resamples(cut, samples=0).resampled_run(self.utility, cut, None)
        else:
            draws = self.resampled_metric(split, "target", None, self.utility)
        return draws.value if isinstance(draws, ResampledRun) else None

    def goal(self, split: str) -> Goal:
        """The rule of a split as the benchmark recorded it; if it did not, from the target's rows."""
        if split in self.settings.goals:
            return self.settings.goals[split]
        target = self.target_utility(split, "tune")
        if target is None:
            return Goal(self.objective, self.utility, math.nan)
        return Goal(self.objective, self.utility, self.floor * target, margin=self.settings.margin * target)

    def scores(self, split: str, method: str, name: str, *phases: str) -> dict[int, ResampledRun]:
        """Seed -> value, turned so that higher is better, with resamples where the run's rows are known."""
        scores: dict[int, ResampledRun] = {}
        for run in self.runs(split, method, *phases):
            draws = self.resampled_metric(split, method, run["seed"], name)
            matched = metric(name).better == "retrained" and (split, "retrained", None) in self._tables
            aim = self.resampled_metric(split, "retrained", None, name) if matched else None
            value = number_of(run, metric(name).compared)
            if isinstance(draws, str) and value is not None:
                draws = ResampledRun(value, np.empty(0))
                aim = ResampledRun(aim.value, np.empty(0)) if isinstance(aim, ResampledRun) else aim
            score = turned_draws(name, draws, aim)
            if isinstance(score, ResampledRun):
                scores[int(run["seed"])] = score
        return scores


Key = tuple[str, str, int | None]


def _tables(rows: pa.Table) -> tuple[dict[Key, pa.Table], dict[str, set[tuple[str, int]]]]:
    """Rows by run, and the rows that tuning runs are judged on.

    The first mapping is (split, method, seed) -> the run's rows, without tuning's (no seed: a reference model); the
    second is split -> (set, index).
    """
    if not rows.num_rows:
        return {}, {}
    names = ("split", "method", "seed", "set", "index")
    phases = rows["phase"].to_pylist() if "phase" in rows.column_names else ["report"] * rows.num_rows
    places: dict[Key, list[int]] = {}
    tuning: dict[str, set[tuple[str, int]]] = {}
    columns = zip(*(rows[name].to_pylist() for name in names), phases, strict=True)
    for number, (split, method, seed, part, index, phase) in enumerate(columns):
        if phase == "tune":
            tuning.setdefault(split, set()).add((part, index))
        else:
            key = split, method, None if method in REFERENCES or seed is None else int(seed)
            places.setdefault(key, []).append(number)
    return {key: rows.take(pa.array(numbers)) for key, numbers in places.items()}, tuning


def split_results(benchmark: BenchmarkData, split: str) -> SplitResults:
    """Means, intervals and verdicts of a split's reported runs."""
    methods = benchmark.methods(split)
    runs = {method: benchmark.runs(split, method, "report") for method in methods}
    rows = {method: _row_values(benchmark, split, method, runs[method]) for method in methods}
    names = [*benchmark.metrics, *([benchmark.utility] if benchmark.utility not in benchmark.metrics else [])]
    summaries = {
        name: {
            method: summary
            for method in methods
            if (summary := _summary(name, runs[method], rows[method].get(name, {}))) is not None
        }
        for name in names
    }
    target = benchmark.target_utility(split)
    utilities = {method: summary.over_seeds.value for method, summary in summaries[benchmark.utility].items()}
    missed = {
        method
        for method in methods
        if target is not None and runs[method] and (utilities.get(method) or 0.0) < benchmark.floor * target
    }
    degenerate = {
        method
        for method, reported in runs.items()
        if 2 * sum(bool(run.get("degenerate")) for run in reported) > len(reported)
    }
    barred: dict[str, Result] = {
        method: "below the utility floor" if method in missed else "degenerate" for method in missed | degenerate
    }
    return SplitResults(
        split,
        methods,
        runs,
        summaries,
        {name: _verdicts(benchmark, split, methods, name, barred) for name in benchmark.metrics if name in tested()},
        {model: benchmark.reference(split, model) for model in REFERENCES},
        target,
        missed,
        degenerate,
        [words for method in methods for words in _mismatches(method, runs[method], rows[method])],
    )


def _row_values(
    benchmark: BenchmarkData, split: str, method: str, runs: Sequence[Trial]
) -> dict[str, dict[int, ResampledRun]]:
    """Metric -> seed -> value computed from the rows (forget quality by its KS statistic)."""
    values: dict[str, dict[int, ResampledRun]] = {}
    for name in (name for name in benchmark.metrics if metric(name).paired and not metric(name).tested_as):
        for run in runs:
            draws = benchmark.resampled_metric(split, method, run["seed"], name)
            if isinstance(draws, ResampledRun):
                values.setdefault(name, {})[int(run["seed"])] = draws
    return values


def _summary(name: str, runs: Sequence[Trial], draws: Mapping[int, ResampledRun]) -> Summary | None:
    values = {int(run["seed"]): value for run in runs if (value := number_of(run, name)) is not None}
    if not values:
        return None
    if metric(name).p_value:
        reason = "p-values: geometric mean, with each run's value"
        return Summary(MetricValue(geometric_mean(list(values.values())), n=len(values), reason=reason), values)
    interval = None
    if values.keys() == draws.keys() and all(len(draw.resampled) for draw in draws.values()):
        mean = ResampledRun(
            float(np.mean(list(values.values()))), np.mean([d.resampled for d in draws.values()], axis=0)
        )
        interval = mean.interval()
    elif len(values) == 1:
        run = next(run for run in runs if number_of(run, name) is not None)
        low, high = number_of(run, f"{name}_low"), number_of(run, f"{name}_high")
        interval = None if low is None or high is None else (low, high)
    return Summary(over_seeds(list(values.values())), values, interval)


def _verdicts(
    benchmark: BenchmarkData, split: str, methods: Sequence[str], name: str, barred: Mapping[str, Result]
) -> dict[str, Verdict]:
    scores = {method: benchmark.scores(split, method, name, "report") for method in methods}
    scores = {method: seeds for method, seeds in scores.items() if seeds}
    return verdicts(scores, barred if metric(name).forgetting else None) if len(scores) > 1 else {}


def _mismatches(method: str, runs: Sequence[Trial], rows: Mapping[str, Mapping[int, ResampledRun]]) -> list[str]:
    return [
        f"{method}, seed {run['seed']}: {name} is {recorded:.6g}, its rows give {rows[name][run['seed']].value:.6g}"
        for run in runs
        for name in rows
        if run["seed"] in rows[name]
        and (recorded := number_of(run, name)) is not None
        and abs(recorded - rows[name][run["seed"]].value) > 1e-6
    ]
