"""Gates: bounds on what an unlearned model does, decided by 95 % intervals.

A gate passes if the whole interval keeps to its bound, so the model has to show that it forgot; that nothing speaks
against it is not enough. A value without an interval (one row) is undecided, and no recipe can change that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ofmu_ray.attacks.attack_metrics import check_metrics
from ofmu_ray.config.promotion import GATES, GateConfig
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.columns import rows_of
from ofmu_ray.metrics.intervals import MetricValue, difference_metric
from ofmu_ray.metrics.paired import ResampledRun, Resamples, tested
from ofmu_ray.metrics.registry import metric
from ofmu_ray.metrics.summary import summarise

Result = Literal["passed", "failed", "undecided", "skipped", "not measured"]
EARLIER = "forget_earlier"
"""Set of the rows of earlier requests; private, as `forget` is part of its name."""


@dataclass(frozen=True)
class GateResult:
    """A gate's decision, with the metric that it was made on."""

    name: str
    metric: str
    compared: str
    """What `value` is: `value`, `difference from holdout rows`, `ratio to the champion`, ..."""
    value: float | None
    low: float | None
    high: float | None
    rows: int | None
    at_least: float | None
    at_most: float | None
    result: Result
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for report and certificate."""
        return asdict(self)


@dataclass
class GateTables:
    """Values by row of the models that gates compare, as `evaluate_model` returns them."""

    result: pa.Table
    champion: pa.Table
    retrained: pa.Table | None = None
    earlier: Sequence[str] = ()
    """The request of each row of the set `forget_earlier`."""
    relearn: Mapping[str, pa.Table] = field(default_factory=dict)
    """`attacks.relearning` of the result: on `requested` rows, on `holdout` rows in their place; `retrained`: of the
    retrained model on requested rows. Empty: not measured."""
    samples: int = 1000
    seed: int = 0
    _metrics: dict[Any, dict[str, MetricValue]] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, int]:
        """Of the intervals."""
        return {"samples": self.samples, "seed": self.seed}

    def metric_value(self, name: str, model: str, rows: str, request: str | None = None) -> MetricValue:
        """A metric of a model (`result`, `retrained`) with `rows` (requested, earlier, holdout) as its forget rows."""
        key = (model, rows, request)
        if key not in self._metrics:
            table = getattr(self, model)
            view = self.view(table, rows, request)
            reference = None if self.retrained is None or rows == "earlier" else self.view(self.retrained, rows)
            self._metrics[key] = summarise(view, reference, bootstrap_samples=self.samples, seed=self.seed)
        return self._metrics[key].get(name, MetricValue.absent(f"the rows do not give {name}"))

    def view(self, table: pa.Table, rows: str, request: str | None = None) -> pa.Table:
        """The table with other rows in the place of the forget rows."""
        if rows == "requested":
            return table.filter(pc.not_equal(table["set"], EARLIER))
        chosen = rows_of(table, EARLIER if rows == "earlier" else "holdout")
        if request is not None:
            chosen = chosen.filter(pa.array([self.earlier[index] == request for index in chosen["index"].to_pylist()]))
        place = chosen.schema.get_field_index("set")
        renamed = chosen.set_column(place, "set", pa.array(["forget"] * chosen.num_rows, pa.string()))
        return pa.concat_tables([renamed, rows_of(table, "holdout")]) if rows == "earlier" else renamed

    @cached_property
    def resamples(self) -> Resamples:
        """Shared draws of rows, for what compares two models."""
        return Resamples(self.view(self.champion, "requested"), **self.options)

    def paired(self, name: str, other: pa.Table, how: Literal["ratio", "difference"]) -> MetricValue:
        """A metric of the result over, or minus, that of another model on the same rows."""
        tables = (self.view(self.result, "requested"), self.view(other, "requested"))
        both = [self.resamples.resampled_run(name, table, None) for table in tables]
        draws = [one for one in both if isinstance(one, ResampledRun)]
        if len(draws) < 2:
            return MetricValue.absent(next(one for one in both if isinstance(one, str)))
        one, two = draws
        combine = np.divide if how == "ratio" else np.subtract
        with np.errstate(divide="ignore", invalid="ignore"):
            value, resampled = float(combine(one.value, two.value)), combine(one.resampled, two.resampled)
        if not np.isfinite(value):
            return MetricValue.absent(f"the other model's {name} is 0")
        interval = ResampledRun(value, np.asarray(resampled), one.units).interval()
        if interval is None:
            return MetricValue(value, n=one.units, reason="one row or cluster: no interval")
        return MetricValue(value, *interval, n=one.units)

    def relearned(self, name: str, rows: str) -> MetricValue:
        """A metric of the relearning attack on these rows."""
        if rows not in self.relearn:
            return MetricValue.absent("the attack was not run")
        reference = self.relearn.get("retrained") if rows == "requested" else None
        results = check_metrics("relearn", self.relearn[rows], reference, **self.options)
        return results.get(name, MetricValue.absent(f"the attack does not give {name}; it gives {', '.join(results)}"))


def check_gates(gates: Sequence[GateConfig], *, holdout: bool, retrained: bool) -> None:
    """Refuse gates that the configured rows and models cannot decide.

    Raises:
        UserError: a gate needs holdout rows or a retrained model that are not configured, or has no paired test.
    """
    for gate in gates:
        if not holdout and (gate.against == "holdout" or "holdout" in metric(gate.metric).needs):
            raise UserError(f"{GATES}: {gate.name} needs rows that no model has seen: set data.holdout.path")
        if not retrained and (gate.against == "retrained" or "retrained" in metric(gate.metric).needs):
            raise UserError(f"{GATES}: {gate.name} needs evaluation.retrained; set it, or drop the gate")
        if gate.against == "champion" and gate.metric not in tested():
            raise UserError(f"{GATES}: {gate.name}: the champion is compared in {', '.join(tested())} only")


def decide(gates: Sequence[GateConfig], tables: GateTables) -> list[GateResult]:
    """All gates on these tables, in order; persistence gates also for each earlier request with two rows or more."""
    return [result for gate in gates for result in _decided(gate, tables)]


def unmeasured(gates: Sequence[GateConfig]) -> list[GateResult]:
    """Gates that were left out because others had failed."""
    return [_result(gate, gate.name, MetricValue.absent("other gates failed"), "not measured") for gate in gates]


def _decided(gate: GateConfig, tables: GateTables) -> Iterator[GateResult]:
    if gate.relearns and not tables.relearn and gate.if_absent == "fail":
        # no recipe gives more rows
        yield _result(gate, gate.name, MetricValue.absent("too few rows for the attack: it needs two"), "undecided")
        return
    if gate.rows == "requested":
        yield _judged(gate, gate.name, _compared(gate, tables))
        return
    if len(tables.earlier) < 2:
        # one row has no interval, and as it stays the only one, no later batch could be decided either
        found = "only one row of earlier requests is" if tables.earlier else "no rows of earlier requests are"
        why = MetricValue.absent(f"{found} left, beside those of this batch")
        yield _result(gate, gate.name, why, "skipped")
        return
    yield _judged(gate, gate.name, _compared(gate, tables))
    for request in dict.fromkeys(tables.earlier):
        if tables.earlier.count(request) > 1:
            yield _judged(gate, f"{gate.name}, request {request}", _compared(gate, tables, request))


def _compared(gate: GateConfig, tables: GateTables, request: str | None = None) -> MetricValue:
    """The metric that the bound is about."""
    if gate.relearns:
        name = gate.metric.removeprefix("relearn/")
        value = tables.relearned(name, "requested")
        if gate.against is None:
            return value
        return difference_metric(value, tables.relearned(name, gate.against))
    if gate.against == "champion":
        return tables.paired(gate.metric, tables.champion, "ratio")
    if gate.against == "retrained" and gate.metric in tested():
        assert tables.retrained is not None
        return tables.paired(gate.metric, tables.retrained, "difference")
    value = tables.metric_value(gate.metric, "result", gate.rows, request)
    if gate.against == "holdout":
        return difference_metric(value, tables.metric_value(gate.metric, "result", "holdout"))
    if gate.against == "retrained":
        return difference_metric(value, tables.metric_value(gate.metric, "retrained", "requested"))
    return value


def _judged(gate: GateConfig, name: str, value: MetricValue) -> GateResult:
    if value.value is None:
        return _result(gate, name, value, "skipped" if gate.if_absent == "skip" else "failed")
    if value.low is None or value.high is None:
        return _result(gate, name, value, "undecided")
    below = gate.at_most is None or value.high <= gate.at_most
    above = gate.at_least is None or value.low >= gate.at_least
    return _result(gate, name, value, "passed" if below and above else "failed")


_COMPARED = {
    "holdout": "difference from holdout rows",
    "retrained": "difference from the retrained model",
    "champion": "ratio to the champion",
    None: "value",
}


def _result(gate: GateConfig, name: str, value: MetricValue, result: Result) -> GateResult:
    return GateResult(
        name=name,
        metric=gate.metric,
        compared=_COMPARED[gate.against],
        value=value.value,
        low=value.low,
        high=value.high,
        rows=value.n,
        at_least=gate.at_least,
        at_most=gate.at_most,
        result=result,
        reason=value.reason,
    )
