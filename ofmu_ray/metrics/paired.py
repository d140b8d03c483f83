"""Paired tests between methods run on the same rows with the same seeds.

A method's score varies with the evaluated rows and with the training seed. Rows (or clusters of rows) are resampled
with the same draw for all methods, seeds and the retrained reference, so shared row effects cancel. Seeds are too few
to resample: where they dominate, resampling three of them calls one in six equal pairs different at the 5 % level (in
simulation, with the variance corrected). Their variance is that of the paired differences instead, and both parts go
into one t statistic with Satterthwaite's degrees of freedom (1946, https://doi.org/10.2307/3002019): one in nineteen
with three seeds, but still one in nine with two.

All pairs of methods are tested, with Holm's correction (1979, https://www.jstor.org/stable/4615733), and only the tests
against the best method are reported: the best method was chosen from the same data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics import functions
from ofmu_ray.metrics.columns import clusters_of, finite, rows_of
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.registry import Metric, Values, metric, metrics, turned
from ofmu_ray.metrics.tofu import SCORES, SETS, UTILITY_SETS

Result = Literal["best", "not significantly worse", "worse", "below the utility floor", "degenerate", "not tested"]


def tested() -> list[str]:
    """Metrics that can be computed from rows, and hence tested. Forget quality means its KS statistic here, as
    differences of p-values mean nothing."""
    return [one.name for one in metrics() if one.paired is not None]


# ------------------------------------------------------------------------------------------------------ resamples


@dataclass(frozen=True)
class ResampledRun:
    """A metric of one run, and its value in each resample of the rows."""

    value: float
    resampled: FloatArray
    """[samples], or [0] if the rows are unknown or cannot be resampled."""
    units: int = 0
    """Number of rows or clusters drawn (in the smallest set)."""

    def interval(self) -> tuple[float, float] | None:
        """95 % percentile interval over rows, widened to contain the value; None without resamples."""
        if not len(self.resampled):
            return None
        low, high = (float(bound) for bound in np.nanpercentile(self.resampled, [2.5, 97.5]))
        return min(low, self.value), max(high, self.value)


@dataclass(frozen=True)
class SetWeights:
    """How often each row of a set occurs in each resample."""

    rows: list[int]
    """The rows' `index`, in the order of the weights."""
    weights: FloatArray
    """[1 + samples, rows]; the first is the data itself, all ones."""
    units: int


class Resamples:
    """The resamples of a split: one draw of rows, shared by all comparisons on it.

    `reference`: per-row table (set, index, cluster and value columns) of any model on the split; every other table must
    contain the same rows. Sets are drawn independently.
    """

    def __init__(self, reference: pa.Table, *, samples: int = 1000, seed: int = 0) -> None:
        self.sets: dict[str, SetWeights] = {}
        means = [one.set for one in metrics() if one.set is not None]
        for number, name in enumerate(dict.fromkeys((*SETS, "test", "test_forgotten", *means))):
            rows = _ordered(reference, name)
            if rows.num_rows:
                clusters = clusters_of(rows)
                labels = np.arange(rows.num_rows) if clusters is None else clusters
                places = np.unique(labels, return_inverse=True)[1]
                units = int(places.max()) + 1
                drawn = np.random.default_rng([seed, number]).multinomial(units, np.full(units, 1 / units), samples)
                weights = np.concatenate([np.ones((1, units)), drawn if units > 1 else np.empty((0, 1))])[:, places]
                self.sets[name] = SetWeights(rows["index"].to_pylist(), weights, units)

    def resampled_run(self, name: str, table: pa.Table, retrained: pa.Table | None) -> ResampledRun | str:
        """The metric of a model from its per-row table, or why it cannot be computed."""
        declared = metric(name)
        if declared.paired == "distance":
            return self._distance(table, retrained)
        if declared.paired == "utility":
            parts = [self._mean(metric(f"{part}_{score}"), table) for part in UTILITY_SETS for score in SCORES]
            reasons = [part for part in parts if isinstance(part, str)]
            if reasons:
                return reasons[0]
            # sets of one row or cluster are not resampled, and then neither is the utility
            means = [part for part in parts if isinstance(part, np.ndarray)]
            samples = min(len(part) for part in means)
            utility = np.asarray(functions.model_utility(np.stack([part[:samples] for part in means], axis=-1)))
            return _draws(utility, min(self.sets[part].units for part in UTILITY_SETS))
        if declared.set is None:
            return f"{name} is not a mean over rows"
        mean = self._mean(declared, table)
        return mean if isinstance(mean, str) else _draws(mean, self.sets[declared.set].units)

    def score(self, name: str, table: pa.Table, retrained: pa.Table | None) -> ResampledRun | str:
        """The metric of a model, turned so that higher is better, or why it cannot be computed."""
        draws = self.resampled_run(name, table, retrained)
        needs_aim = metric(name).better == "retrained" and retrained is not None
        return turned_draws(name, draws, self.resampled_run(name, retrained, None) if needs_aim else None)

    def _values(self, values: Values, part: str, table: pa.Table) -> FloatArray | str:
        rows = _ordered(table, part)
        if part not in self.sets or not rows.num_rows:
            return f"no {part} rows"
        if rows["index"].to_pylist() != self.sets[part].rows:
            return f"its {part} rows differ from the rest of the split"
        return values(rows, part)

    def _mean(self, declared: Metric, table: pa.Table) -> FloatArray | str:
        """Mean over rows in the data and in each resample, [1 + samples]; rows without the value are skipped."""
        assert declared.set is not None
        assert declared.values is not None
        values = self._values(declared.values, declared.set, table)
        if isinstance(values, str):
            return values
        weights = self.sets[declared.set].weights
        with np.errstate(invalid="ignore"):  # NaN if no row of a resample has the value
            return np.asarray((weights @ np.nan_to_num(values)) / (weights @ ~np.isnan(values)))

    def _distance(self, table: pa.Table, retrained: pa.Table | None) -> ResampledRun | str:
        """KS statistic of the truth ratios of the forget rows against the retrained model's on the same rows."""
        if retrained is None:
            return "there is no retrained model"
        one, two = (self._values(_ratios, "forget", source) for source in (table, retrained))
        if isinstance(one, str):
            return one
        if isinstance(two, str):
            return f"retrained model: {two}"
        if np.isnan(one).any() or np.isnan(two).any():
            return "some forget rows lack their truth ratio"
        weights = self.sets["forget"].weights
        levels = np.unique(np.concatenate([one, two]))
        apart = functions.counts_up_to(one, levels, weights) - functions.counts_up_to(two, levels, weights)
        return _draws(np.abs(apart).max(axis=1) / weights.sum(axis=1), self.sets["forget"].units)


def turned_draws(name: str, draws: ResampledRun | str, retrained: ResampledRun | str | None) -> ResampledRun | str:
    """The metric, turned so that higher is better (`registry.turned`). A reason is passed on.

    `retrained`: the retrained model's, or the reason for its absence; None: there is no such model.
    """
    if isinstance(draws, str):
        return draws
    if isinstance(retrained, str):
        return retrained
    declared = metric(metric(name).compared)
    value = turned(declared, draws.value, None if retrained is None else retrained.value)
    resampled = turned(declared, draws.resampled, None if retrained is None else retrained.resampled)
    if isinstance(value, str) or isinstance(resampled, str):
        return str(value)
    return ResampledRun(value, resampled, draws.units)


def _ratios(rows: pa.Table, name: str) -> FloatArray | str:
    return finite(rows, name, "truth_ratio")


def _ordered(table: pa.Table, name: str) -> pa.Table:
    return rows_of(table, name).sort_by("index")


def _draws(values: FloatArray, units: int) -> ResampledRun:
    return ResampledRun(float(values[0]), values[1:], units)


# ------------------------------------------------------------------------------------------------------------ tests


@dataclass(frozen=True)
class PairedTest:
    """Two-sided test of the mean difference of a score between two methods, a - b."""

    difference: float
    low: float | None
    """95 % interval of the difference, not corrected for the number of tests; None if unknown."""
    high: float | None
    p_value: float | None
    seeds: int
    covers: str
    """Sources of variation in the interval and the p-value: rows and seeds, rows only, seeds only, or nothing."""


def paired_test(a: Mapping[int, ResampledRun], b: Mapping[int, ResampledRun]) -> PairedTest | None:
    """Compare two methods (seed -> score, from the same draws) over their common seeds; None: no common seed."""
    from scipy.stats import t

    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    differences = np.array([a[seed].value - b[seed].value for seed in seeds])
    variances, freedoms, covers = [], [], []
    units = min(min(a[seed].units, b[seed].units) for seed in seeds)
    if units > 1 and all(len(a[seed].resampled) and len(b[seed].resampled) for seed in seeds):
        resampled = np.mean([a[seed].resampled - b[seed].resampled for seed in seeds], axis=0)
        variances.append(float(np.nanvar(resampled)) * units / (units - 1))
        freedoms.append(units - 1)
        covers.append("rows")
    if len(seeds) > 1:
        variances.append(float(np.var(differences, ddof=1)) / len(seeds))
        freedoms.append(len(seeds) - 1)
        covers.append("seeds")
    difference, variance = float(differences.mean()), sum(variances)
    words = " and ".join(covers) + (" only" if len(covers) == 1 else "") if covers else "nothing"
    if not covers:
        return PairedTest(difference, None, None, None, len(seeds), words)
    if variance == 0:
        return PairedTest(difference, difference, difference, float(difference == 0), len(seeds), words)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in zip(variances, freedoms, strict=True))
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    p_value = 2 * float(t.sf(abs(difference) / math.sqrt(variance), freedom))
    return PairedTest(difference, difference - half, difference + half, p_value, len(seeds), words)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: testing them at 0.05 bounds the chance of any false claim by it."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[int(index)] = largest
    return adjusted


@dataclass(frozen=True)
class Verdict:
    """Verdict on a method for one metric of a split's table."""

    result: Result
    test: PairedTest | None = None
    """The best method against this one (a positive difference: the best is better)."""
    p_adjusted: float | None = None


def verdicts(
    scores: Mapping[str, Mapping[int, ResampledRun]], barred: Mapping[str, Result] | None = None, level: float = 0.05
) -> dict[str, Verdict]:
    """Method -> (seed -> score, higher is better) -> its verdict against the best method.

    `barred`: methods that cannot be best in this metric, and why; they are not compared.
    """
    barred = barred or {}
    results = {method: Verdict(barred[method]) for method in scores if method in barred}
    means = {
        method: float(np.mean([draws.value for draws in seeds.values()]))
        for method, seeds in scores.items()
        if method not in barred and seeds
    }
    if not means:
        return results
    tests = {(one, two): paired_test(scores[one], scores[two]) for one, two in combinations(means, 2)}
    p_values = {pair: test.p_value for pair, test in tests.items() if test is not None and test.p_value is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    best = max(means, key=lambda method: means[method])
    results[best] = Verdict("best")
    for method in means.keys() - {best}:
        pair = (best, method) if (best, method) in tests else (method, best)
        test, p_value = tests[pair], adjusted.get(pair)
        if test is not None and pair[0] != best:
            test = _reversed(test)
        if test is None or p_value is None:
            results[method] = Verdict("not tested", test)
        else:  # on the seeds that both have, a method with a lower mean over its own may be the better one
            worse = p_value < level and test.difference > 0
            results[method] = Verdict("worse" if worse else "not significantly worse", test, p_value)
    return {method: results[method] for method in scores if method in results}


def _reversed(test: PairedTest) -> PairedTest:
    low, high = (None if bound is None else -bound for bound in (test.high, test.low))
    return replace(test, difference=-test.difference, low=low, high=high)
