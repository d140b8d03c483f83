"""Comparing methods over many runs: Pareto fronts, hypervolume, sensitivity.

A trial is a mapping with the metrics of one run as plain numbers (None: absent), `phase`, `trial`, `flops` and
`options` (dotted overrides as JSON). The rule that chooses trials is in `rule.py`, the paired tests between methods
are in `paired.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ofmu_ray.metrics.functions import FloatArray

Trial = Mapping[str, Any]


def number_of(trial: Trial, name: str) -> float | None:
    """A metric of a trial; None if absent or not finite."""
    value = trial.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def plain(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics in JSON form (`MetricValue.to_json`) as plain numbers: NAME, NAME_low, NAME_high (None: absent)."""
    numbers: dict[str, Any] = {}
    for name, value in metrics.items():
        numbers |= {name: value.get("value"), f"{name}_low": value.get("low"), f"{name}_high": value.get("high")}
    return numbers


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log)) of values >= 0, for p-values, which span many orders of magnitude; 0 if any is 0."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(np.asarray(values, dtype=np.float64)))))


# ------------------------------------------------------------------------------------------------------- the plane


def pareto_front(points: ArrayLike) -> NDArray[np.int64]:
    """Indices of the non-dominated points by increasing x; both coordinates are maximised. [points, 2] -> [n].

    A point dominates another if it is at least as high in both coordinates and higher in one: equal points all stay.
    """
    values = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    order = np.lexsort((-values[:, 1], -values[:, 0]))  # x decreasing, then y decreasing
    kept: list[int] = []
    best = -np.inf  # highest y among the points before in this order
    for index in order:
        same = bool(kept) and np.array_equal(values[index], values[kept[-1]])
        if values[index, 1] > best or same:
            kept.append(int(index))
            best = values[index, 1]
    return np.array(kept[::-1], dtype=np.int64)


def hypervolume(points: ArrayLike, reference: tuple[float, float]) -> float:
    """Exact area that the points dominate above `reference`; both coordinates are maximised. [points, 2] -> area.

    In two dimensions the area is a staircase of rectangles along the front (Zitzler and Thiele, 1998).
    """
    above = np.asarray(points, dtype=np.float64).reshape(-1, 2) - np.asarray(reference)
    above = above[(above > 0).all(axis=1)]
    front = above[pareto_front(above)]  # x increases, y decreases
    widths = np.diff(front[:, 0], prepend=0.0)
    return float(np.sum(widths * front[:, 1]))


# ----------------------------------------------------------------------------------------------------- sensitivity


@dataclass(frozen=True)
class Sensitivity:
    """How an option correlates with the outcome over a method's tuning trials on a split: marginal ranks only.

    All options vary at once, so a correlation may be due to another option: it describes the trials, not a cause.
    """

    option: str
    values: FloatArray
    """[trials]"""
    objective: FloatArray
    """[trials]"""
    utility: FloatArray
    """[trials]"""
    objective_correlation: float | None
    """Spearman's rank correlation in [-1, 1]; None with fewer than three trials or a constant outcome."""
    utility_correlation: float | None


def sensitivity(trials: Sequence[Trial], objective: str, utility: str) -> list[Sensitivity]:
    """Sensitivity to every numeric option that varies over the tuning trials (of one method and split) with both
    metrics."""
    rows = [
        (json.loads(trial.get("options") or "{}"), goal, kept)
        for trial in trials
        if trial.get("phase") == "tune"
        and (goal := number_of(trial, objective)) is not None
        and (kept := number_of(trial, utility)) is not None
    ]
    result = []
    for option in dict.fromkeys(name for options, _, _ in rows for name in options):
        points = np.array(
            [(options[option], goal, kept) for options, goal, kept in rows if _is_number(options.get(option))],
            dtype=np.float64,
        ).reshape(-1, 3)
        values, goals, kept_utility = points.T
        if len(np.unique(values)) > 1:
            correlations = _spearman(values, goals), _spearman(values, kept_utility)
            result.append(Sensitivity(option, values, goals, kept_utility, *correlations))
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _spearman(values: FloatArray, outcome: FloatArray) -> float | None:
    from scipy.stats import spearmanr

    if len(values) < 3 or len(np.unique(outcome)) < 2:
        return None
    return float(spearmanr(values, outcome).statistic)
