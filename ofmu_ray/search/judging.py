"""The numeric rule of a benchmark or sweep, and its verdict on a run.

Both come from per-row values of the target and the retrained model on the rows that runs are judged on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ofmu_ray.metrics.degeneration import SoundRange, failed_measures
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.runs.trial import SplitData

Tables = Mapping[str, Any]
"""target, retrained -> per-row values (pyarrow Table), or None."""


def cut(data: SplitData, tables: Tables, rows: int | None) -> dict[str, Any]:
    """The tables on the rows that runs are judged on."""
    from ofmu_ray.evaluation.sample import RowSample

    sample = RowSample.of(data.evaluator.sets, rows)
    return {model: sample.cut(table) for model, table in tables.items()}


def reference_value(data: SplitData, tables: Tables, rows: int | None, model: str, name: str) -> float | None:
    """A metric of the target or the retrained model on the rows that runs are judged on; None if it is absent."""
    from ofmu_ray.metrics.summary import summarise

    tables_cut = cut(data, tables, rows)
    if tables_cut[model] is None:
        return None
    value = summarise(tables_cut[model], tables_cut["retrained"], bootstrap_samples=1).get(name)
    return None if value is None else value.value


def sound_of(data: SplitData, tables: Tables, rows: int | None, longest: int | None = None) -> SoundRange | None:
    """The range that runs' generations should be in; `longest`: their limit in tokens, if not the references'."""
    from ofmu_ray.metrics.generations import sound_generations

    samples, tables_cut = data.evaluator.evaluation.bootstrap_samples, cut(data, tables, rows)
    return sound_generations(tables_cut["target"], tables_cut["retrained"], bootstrap_samples=samples, longest=longest)


def goal_of(
    data: SplitData,
    tables: Tables,
    *,
    objective: str,
    utility: str,
    floor: float | None,
    rows: int | None,
    longest: int | None,
    margin: float = 0.0,
) -> Goal:
    """The rule. `floor`, `margin`: in units of the metric `utility`; `rows`: per set; `longest`: generation limit
    (tokens)."""
    retrained = reference_value(data, tables, rows, "retrained", objective)
    return Goal(objective, utility, floor, retrained, sound_of(data, tables, rows, longest), margin)


def marks(values: Mapping[str, Any], sound: SoundRange | None) -> dict[str, Any]:
    """Columns of the trials table about a run's generations: whether they are degenerate, and by which measures."""
    failed = failed_measures(values, sound)
    return {"degenerate": None if failed is None else bool(failed), "degenerate_by": ", ".join(failed or ())}
