"""Every metric, declared once: scorer, intervals, rule, paired tests, reports, terminal and MLflow read it here.

A new metric is one `register(Metric(...))` beside its function. Most are means over the rows of one set and need no
more than `values`; what several sets or two models give together comes from `compute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics.columns import clusters_of, rows_of
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import Clusters, MetricValue, mean_metric

Better = Literal["high", "low", "zero", "retrained", "depends"]
"""Which way is better. retrained: near what a model scores that never saw the forget rows; depends: on the rows, or
nobody declared it, and no rule compares by it."""
Group = Literal["Forgetting", "Utility", "Memorisation", "Generations", "Membership inference", "Probes", "Robustness"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""In the order of reports."""
Number = TypeVar("Number", float, FloatArray)
Values = Callable[[pa.Table, str], FloatArray | str]
"""(rows of a set, its name) -> a value of each row [rows], NaN where it has none; or why there are none."""
NEEDS_RETRAINED = "needs a model trained without the forget rows (evaluation.retrained)"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, or with a `*` in its name one for each probe or membership attack."""

    name: str
    """As in metrics.json."""
    label: str
    """For tables and axes; {} stands for what the `*` is."""
    better: Better
    alone: Literal["high", "low"] | None = None
    """Of better="retrained": which way is better without a retrained model; None: no rule compares by it then."""
    group: Group
    """Heading under which reports show it."""
    rows: Literal["texts", "images"] = "texts"
    """The kind of rows that it is computed for."""
    set: str | None = None
    """The set of rows that it is a mean over."""
    values: Values | None = None
    always: bool = False
    """Listed, as absent with the reason, where the set has no rows."""
    only: Callable[[pa.Table], bool] | None = None
    """Whether it is listed for these rows; None: for all."""
    compute: Callable[[Inputs], Mapping[str, MetricValue]] | None = None
    """Computes it, and others that share the work, where it is no mean over rows."""
    needs: frozenset[str] = frozenset()
    """retrained, generations, or a set of rows besides forget and retain (holdout, real_authors, world_facts)."""
    paired: Literal["mean", "distance", "utility"] | None = None
    """The paired test between methods: of means, of KS distances, of model utility; None: it is not tested."""
    p_value: bool = False
    """Spans orders of magnitude: logarithmic axes, geometric means."""
    span: float | None = None
    """Its largest value, if it is bounded by that and 0, for `score`; None: it has no score."""
    tested_as: str = ""
    """The metric that the paired test compares instead; empty: itself."""
    headline: bool = False
    """Shown on the terminal."""
    lead: str = ""
    """What it is, where it leads a run's page and MLflow's description; empty: it does not."""
    first: bool = False
    """In the first of a benchmark's tables, not in the one of all other metrics."""

    @property
    def noun(self) -> str:
        """The label within a sentence: model utility, KS distance to retrained."""
        return self.label if self.label[1:2].isupper() else self.label[:1].lower() + self.label[1:]

    def score(self, value: float | None, retrained: float | None) -> float | None:
        """1 at the best value, 0 as far from it as can be; None: it has none, or a value is missing."""
        if value is None or self.span is None or self.better == "depends":
            return None
        if self.better == "retrained":
            return None if retrained is None else 1.0 - abs(value - retrained) / self.span
        return value / self.span if self.better == "high" else 1.0 - abs(value) / self.span

    @property
    def score_words(self) -> str:
        """What `score` is: 1 − KS distance to retrained."""
        part = "" if self.span == 1 else f" / {self.span:g}"
        if self.better == "high":
            return f"{self.noun}{part}"
        return f"1 − {f'distance of {self.noun} from retrained' if self.better == 'retrained' else self.noun}{part}"

    @property
    def compared(self) -> str:
        """Name of the metric that the paired test compares."""
        return self.tested_as or self.name

    @property
    def forgetting(self) -> bool:
        """Whether it measures forgetting, which a method can have for free by destroying the model."""
        return self.group == "Forgetting"


@dataclass
class Inputs:
    """What metrics are computed from: the tables of values by row of a model and of the retrained one."""

    table: pa.Table
    retrained: pa.Table | None
    samples: int = 1000
    """Bootstrap samples of the intervals."""
    seed: int = 0
    _rows: dict[str, pa.Table] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, int]:
        """Of the intervals."""
        return {"samples": self.samples, "seed": self.seed}

    @property
    def kind(self) -> str:
        """texts or images."""
        return "images" if "predicted" in self.table.column_names else "texts"

    def rows(self, name: str) -> pa.Table:
        """The rows of a set."""
        if name not in self._rows:
            self._rows[name] = rows_of(self.table, name)
        return self._rows[name]

    def values(self, metric: Metric) -> FloatArray | str:
        """A value of each row, or why there are none."""
        assert metric.set is not None
        assert metric.values is not None
        rows = self.rows(metric.set)
        if rows.num_rows == 0:
            return f"no {metric.set} rows were evaluated (evaluation.sets.{metric.set})"
        return metric.values(rows, metric.set)

    def mean(self, metric: Metric) -> MetricValue:
        """The mean over the rows that have the value."""
        assert metric.set is not None
        return mean_of(self.values(metric), clusters_of(self.rows(metric.set)), metric.name, **self.options)


def mean_of(values: FloatArray | str, clusters: Clusters, name: str, **options: int) -> MetricValue:
    """Mean over the rows that have a value, with its interval; absent with the reason where there is none."""
    if isinstance(values, str):
        return MetricValue.absent(values)
    there = ~np.isnan(values)
    if not there.any():
        return MetricValue.absent("no row has it")
    return mean_metric(values[there], name=name, clusters=None if clusters is None else clusters[there], **options)


_DECLARED: dict[str, Metric] = {}


def register(*declared: Metric) -> None:
    """Add metrics; they are listed in the order in which they are declared. A name is declared once."""
    for one in declared:
        assert one.name not in _DECLARED, f"the metric {one.name} is declared twice"
        _DECLARED[one.name] = one


def metrics() -> list[Metric]:
    """All that are declared."""
    return list(_DECLARED.values())


def metric(name: str) -> Metric:
    """The declaration of a metric by its name in metrics.json; what nobody declared has no better direction."""
    if name in _DECLARED:
        return _DECLARED[name]
    for one in _DECLARED.values():
        if "*" in one.name and fnmatchcase(name, one.name):
            head, _, tail = one.name.partition("*")
            which = name[len(head) : len(name) - len(tail)]
            return Metric(**{**vars(one), "name": name, "label": _spelled(one.label, which)})
    return Metric(name=name, label=name.replace("_", " ").capitalize(), better="depends", group="Utility")


def turned(one: Metric, value: Number, retrained: Number | None) -> Number | str:
    """A metric's value, or values [samples], turned so that higher is better; or why nobody can tell.

    `retrained`: the retrained model's; None: there is none.
    """
    if one.better == "depends":
        return "which way is better is not declared: choose another objective"
    if one.better == "zero":
        return -abs(value)
    if one.better == "retrained" and retrained is not None:
        return -abs(value - retrained)
    way = one.alone if one.better == "retrained" else one.better
    if way is None:
        return f"{NEEDS_RETRAINED}, or choose another objective"
    return value if way == "high" else -value


def _spelled(label: str, which: str) -> str:
    words = label.format(which.replace("_", " "))
    return words[0].upper() + words[1:]


def compute(inputs: Inputs) -> dict[str, Any]:
    """All metrics that the rows give, each with its interval, or absent with the reason."""
    return dict(_computed(inputs))


def _computed(inputs: Inputs) -> Iterator[tuple[str, MetricValue]]:
    done: dict[Any, Mapping[str, MetricValue]] = {}
    for one in metrics():
        if one.rows != inputs.kind:
            continue
        if one.values is not None and one.set is not None:
            rows = inputs.rows(one.set)
            if one.always or (rows.num_rows and (one.only is None or one.only(rows))):
                yield one.name, inputs.mean(one)
        elif one.compute is not None:
            if one.compute not in done:
                done[one.compute] = one.compute(inputs)
                if "*" in one.name:  # a family gives all of its members where the first of them is declared
                    yield from done[one.compute].items()
            if one.name in done[one.compute]:
                yield one.name, done[one.compute][one.name]
