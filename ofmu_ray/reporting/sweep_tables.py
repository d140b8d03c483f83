"""The tables of a sweep's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ofmu_ray.attacks.importance import Importance
from ofmu_ray.metrics.fronts import Trial, geometric_mean, number_of, sensitivity
from ofmu_ray.metrics.intervals import over_seeds
from ofmu_ray.metrics.registry import metric
from ofmu_ray.reporting import formats
from ofmu_ray.reporting.benchmark_tables import heading
from ofmu_ray.reporting.sweep_results import SweepData, options, short
from ofmu_ray.reporting.tables import Cell, Table, cells

BEST = 10
"""Trials in the table; trials.csv has all."""


def metrics_table(sweep: SweepData) -> Table | None:
    """The recommended trial's metrics (the rule's first) next to fresh seeds and the reference models."""
    trial = sweep.recommended
    if trial is None or sweep.chosen is None:
        return None
    values: Mapping[str, Any] = sweep.chosen.get("figures") or {}
    references: Mapping[str, Any] = sweep.settings.get("references") or {}
    models = [model for model in ("target", "retrained") if references.get(model)]
    known = [name for name, value in values.items() if (value or {}).get("value") is not None]
    fresh = ["Fresh seeds, all rows"] if sweep.fresh else []
    rows = [
        cells(
            _heading(sweep, name),
            _reference(values.get(name)),
            *(fresh_cell(sweep.fresh, name) for _ in fresh),
            _metric(trial, name),
            *(_reference(references[model].get(name)) for model in models),
        )
        for name in dict.fromkeys((sweep.objective, sweep.utility, *known))
    ]
    header = ["Metric", "Chosen, all rows", *fresh, "Chosen, as judged", *(f"{model}, as judged" for model in models)]
    caption = f"Trial {trial['number']} with 95 % intervals; {judged_on(sweep)}"
    return Table(name="", caption=caption, header=header, rows=rows)


def _heading(sweep: SweepData, name: str) -> str:
    return heading(name, retrained=bool((sweep.settings.get("references") or {}).get("retrained")))


def judged_on(sweep: SweepData) -> str:
    """The rows that trials are judged on, in words."""
    rows = sweep.search.get("rows")
    return "trials are judged on all rows" if rows is None else f"trials are judged on {rows} rows of each set"


def fresh_cell(fresh: Sequence[Trial], name: str) -> Cell:
    """Mean over fresh seeds with Student's t interval; for p-values, the geometric mean and each run's value."""
    values = [value for trial in fresh if (value := number_of(trial, name)) is not None]
    if not values:
        return Cell("–")
    count = f"{len(values)} of {len(fresh)} seeds"
    if metric(name).p_value:
        runs = " · ".join(formats.number(value) for value in values)
        return Cell(formats.number(geometric_mean(values)), (f"runs {runs}", count))
    mean = over_seeds(values)
    return Cell(formats.number(mean.value), (formats.span(mean.value, mean.low, mean.high), count))


def _metric(trial: Trial, name: str) -> Cell:
    value, low, high = (number_of(trial, f"{name}{end}") for end in ("", "_low", "_high"))
    return Cell(formats.number(value), () if low is None or high is None else (formats.span(value, low, high),))


def _reference(value: Mapping[str, Any] | None) -> Cell:
    shown = formats.cell(value)
    return Cell(shown.text, (shown.interval,) if shown.interval else (), title=shown.reason)


def best_table(sweep: SweepData) -> Table | None:
    """The first trials in the rule's order and the fresh seeds; if nothing is recommended, the front too."""
    front = [] if sweep.recommended else [trial for trial in sweep.completed[BEST:] if trial.get("front")]
    fields = [str(knob["field"]) for knob in sweep.space]
    rows = []
    for trial in (*sweep.completed[:BEST], *front, *sweep.fresh):
        chosen, status = trial is sweep.recommended, str(trial.get("status"))
        signs = ["chosen"] * chosen + ["nearest"] * (trial is sweep.nearest) + ["front"] * bool(trial.get("front"))
        signs += ["degenerate"] * bool(sweep.goal.degenerate(trial))
        signs += [status.replace("_", " ")] * (status != "finished")
        name = f"seed {trial.get('seed')}" if trial.get("phase") == "confirm" else str(trial["number"])
        both = (_metric(trial, name) for name in (sweep.objective, sweep.utility))
        flops, drawn = number_of(trial, "flops"), options(trial)
        cost = "–" if flops is None else formats.quantity(flops).rstrip()
        values = (_value(drawn.get(field, "–")) for field in fields)
        rows.append(cells(Cell(name, tuple(signs), strong=chosen), *both, *values, cost))
    names = [short(field, sweep.space) for field in fields]
    header = ["Trial", _heading(sweep, sweep.objective), _heading(sweep, sweep.utility), *names, "FLOPs"]
    return Table(name="", caption="", header=header, rows=rows) if rows else None


def _value(value: Any) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def options_table(sweep: SweepData) -> Table | None:
    """The tuned options, their ranges and sources, ranges for a next sweep, and how much each option mattered.

    For each of the rule's two metrics: the option's share of the importance (most important first) and its rank
    correlation.
    """
    narrowed: Mapping[str, str] = sweep.settings.get("priors") or {}
    # `sensitivity` takes trials of phase "tune"
    tuned = [{**trial, "phase": "tune"} for trial in sweep.completed]
    ranks = {entry.option: entry for entry in sensitivity(tuned, sweep.objective, sweep.utility)}
    shares = [{row.option: row for row in sweep.importances.get(n, ())} for n in (sweep.objective, sweep.utility)]
    order = list(shares[0])
    rows = []
    for knob in sorted(sweep.space, key=lambda k: order.index(k["field"]) if k["field"] in order else len(order)):
        field, entry = str(knob["field"]), ranks.get(str(knob["field"]))
        given = (f"only where {knob['given']} is not 0",) if knob.get("given") else ()
        correlations = (entry.objective_correlation, entry.utility_correlation) if entry else (None, None)
        mattered = [_mattered(share.get(field), rank) for share, rank in zip(shares, correlations, strict=True)]
        more = [narrowed.get(field, "–")] if narrowed else []
        why = str(knob.get("why") or "")
        rows.append(cells(Cell(short(field, sweep.space), given), *mattered, str(knob["prior"]), *more, why))
    names = [f"{formats.label(name)}, share" for name in (sweep.objective, sweep.utility)]
    header = ["Option", *names, "Prior", *(["For a next sweep"] if narrowed else []), "Source of the range"]
    return Table(name="", caption="", header=header, rows=rows, words=6) if rows else None


def _mattered(row: Importance | None, rank: float | None) -> Cell:
    lines = () if rank is None else (f"rank {rank:+.2f}",)
    if row is None:
        return Cell("–", lines)
    interval = formats.span(row.share, row.low, row.high)
    return Cell(formats.number(row.share), (interval, f"p = {formats.number(row.p_value)}", *lines))


def records(sweep: SweepData) -> list[dict[str, Any]]:
    """Records of trials.csv: everything known about each trial, with a column per option."""
    fields = dict.fromkeys(name for trial in sweep.all for name in options(trial))
    return [{**trial, **{f"option.{name}": options(trial).get(name) for name in fields}} for trial in sweep.all]
