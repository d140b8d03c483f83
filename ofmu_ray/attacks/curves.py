"""Metrics of attack tables: curves over steps and gaps to a reference. Pure functions, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from ofmu_ray.metrics.functions import FloatArray


class RowCurves(NamedTuple):
    """Each row's answer probability over the steps of a relearning attack."""

    row_ids: list[str]
    clusters: list[str | None]
    steps: FloatArray
    """[steps], ascending from 0."""
    probability: FloatArray
    """[rows, steps]."""

    @property
    def mean(self) -> FloatArray:
        """Mean over rows, [steps]."""
        return np.asarray(self.probability.mean(axis=0))


def row_curves(table: pa.Table, group: str) -> RowCurves:
    """The curves of one group ("attacked", "forget" or "retain") of `relearning.relearn`'s table."""
    rows = table.filter(pc.equal(table["group"], group))
    steps = np.unique(rows["step"].to_numpy())
    pieces = [rows.filter(pc.equal(rows["step"], int(step))) for step in steps]
    row_ids = pieces[0]["row_id"].to_pylist()
    if any(piece["row_id"].to_pylist() != row_ids for piece in pieces):
        raise AssertionError(f"group {group}: the steps have different rows")
    values = np.stack([piece["probability"].to_numpy() for piece in pieces], axis=1)
    return RowCurves(row_ids, pieces[0]["cluster"].to_pylist(), steps.astype(np.float64), values)


def areas(curves: RowCurves, reference: RowCurves | None = None) -> FloatArray:
    """Mean height of each row's curve over the steps (trapezoidal rule), minus the reference's; [rows], in [-1, 1].

    With the retrained model as reference, the mean over rows is the probability that the attack recovers beyond what it
    teaches a model that never saw the rows. Raises AssertionError unless both have the same rows and steps.
    """
    heights = curves.probability
    if reference is not None:
        if curves.row_ids != reference.row_ids or not np.array_equal(curves.steps, reference.steps):
            raise AssertionError("the two curves come from different attacks")
        heights = heights - reference.probability
    return np.asarray(np.trapezoid(heights, curves.steps, axis=1) / curves.steps[-1])


def steps_to_reach(steps: ArrayLike, values: ArrayLike, level: float) -> float | None:
    """First step at which a curve [steps] reaches `level`, interpolated linearly between measured steps.

    None: never during the attack. For "recovers half of what the target knew", `level` is half the target's mean
    probability on the same rows.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    reached = np.flatnonzero(y >= level)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0:
        return float(x[0])
    share = (level - y[at - 1]) / (y[at] - y[at - 1])
    return float(x[at - 1] + share * (x[at] - x[at - 1]))


def by_condition(table: pa.Table, column: str, value: str = "probability") -> dict[str, FloatArray]:
    """Per-row values by the condition in `column` ("scheme" or "attack"): [rows] each, in the table's order."""
    names: Sequence[str] = table[column].unique().to_pylist()
    return {name: table.filter(pc.equal(table[column], name))[value].to_numpy() for name in names}
