"""The rule of a benchmark or sweep with its numbers, and what it says of a run: from the per-row values of the target
and the retrained model on the rows that runs are judged on."""

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


def reference_figure(data: SplitData, tables: Tables, rows: int | None, model: str, name: str) -> float | None:
    """A figure of the target or of the retrained model on the rows that runs are judged on; None where it is absent."""
    from ofmu_ray.metrics.summary import summarise

    found = cut(data, tables, rows)
    if found[model] is None:
        return None
    return summarise(found[model], found["retrained"], bootstrap_samples=1)[name].value


def sound_of(data: SplitData, tables: Tables, rows: int | None, longest: int | None = None) -> SoundRange | None:
    """What generations of runs are held against; `longest`: of theirs, in tokens, where it is not the references'."""
    from ofmu_ray.metrics.generations import sound_generations

    samples, found = data.evaluator.evaluation.bootstrap_samples, cut(data, tables, rows)
    return sound_generations(found["target"], found["retrained"], bootstrap_samples=samples, longest=longest)


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
    """The rule. `floor`, `margin`: in units of the metric `utility`; `rows`: of each set; `longest`: generation
    (tokens)."""
    retrained = reference_figure(data, tables, rows, "retrained", objective)
    return Goal(objective, utility, floor, retrained, sound_of(data, tables, rows, longest), margin)


def marks(figures: Mapping[str, Any], sound: SoundRange | None) -> dict[str, Any]:
    """Columns of the trials table about the generations of a run (plain numbers): is it degenerate, and by what."""
    failed = failed_measures(figures, sound)
    return {"degenerate": None if failed is None else bool(failed), "degenerate_by": ", ".join(failed or ())}
