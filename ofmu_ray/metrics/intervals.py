"""Values with 95 % intervals: percentile bootstrap over rows or clusters of rows, seeded and vectorised.

Rows about the same person are not independent, so clusters (persons) are drawn with replacement. A resample is a vector
of weights, how often each row was drawn; clusters differ in size, so every mean is a ratio of weighted sums
(pairs cluster bootstrap: Cameron, Gelbach and Miller, 2008, https://doi.org/10.1162/rest.90.3.414).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics import membership
from ofmu_ray.metrics.functions import FloatArray

Clusters = NDArray[Any] | None
"""The cluster of each row [rows]; None: every row is its own."""

_BLOCK_ELEMENTS = 1 << 22  # resampled values in memory at once (32 MiB of float64)


@dataclass(frozen=True)
class MetricValue:
    """A number with its 95 % interval and number of rows; or no number, and the reason.

    A number without an interval also has a reason. `clusters`: number of clusters drawn, in the sets that have them.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    reason: str | None = None
    clusters: int | None = None

    @classmethod
    def absent(cls, reason: str) -> MetricValue:
        return cls(value=None, reason=reason)

    def to_json(self) -> dict[str, float | int | str | None]:
        """`{"value", "low", "high", "n"}` plus "clusters" and "reason" if not None; or `{"value": None,
        "reason"}`."""
        if self.value is None:
            return {"value": None, "reason": self.reason}
        fields = {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
        more = {"clusters": self.clusters, "reason": self.reason}
        return fields | {name: extra for name, extra in more.items() if extra is not None}


@dataclass(frozen=True)
class ResampledValue:
    """A number and its value in each resample [samples]; no resamples if a set has one row or one cluster."""

    value: float
    resampled: FloatArray | None
    n: int
    clusters: int | None = None

    def metric_value(self) -> MetricValue:
        if self.resampled is None or np.isnan(self.resampled).all():
            reason = "no interval: a set of one row or one cluster cannot be resampled"
            return MetricValue(self.value, n=self.n, clusters=self.clusters, reason=reason)
        low, high = (float(bound) for bound in np.nanpercentile(self.resampled, [2.5, 97.5]))
        # resampling biases the KS statistic upwards: the interval is widened to contain the value
        return MetricValue(self.value, min(low, self.value), max(high, self.value), self.n, clusters=self.clusters)


def mean_metric(values: FloatArray, *, samples: int, seed: int, name: str, clusters: Clusters = None) -> MetricValue:
    """Mean over rows. `name` separates the random streams of metrics that share a seed."""

    def mean(weights: FloatArray) -> FloatArray:
        return np.asarray(weights @ values / weights.sum(axis=1))

    return resampled_estimates(mean, [values.mean()], [(len(values), clusters)], samples, seed, name)[0].metric_value()


def utility_estimate(
    sets: Mapping[str, Sequence[FloatArray]],
    *,
    samples: int,
    seed: int,
    name: str,
    clusters: Mapping[str, Clusters] | None = None,
) -> ResampledValue:
    """Model utility: the sets' rows are resampled independently, a row's three values jointly.

    `sets` maps a set to its three columns [rows] (NaN: the row lacks this value); n counts the rows of all sets.
    """
    stacked = [np.stack(columns, axis=1) for columns in sets.values()]  # [rows, 3] each

    def utility(*weights: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore"):  # NaN if no row of a resample has the value; skipped
            means = [
                (draws @ np.nan_to_num(values)) / (draws @ ~np.isnan(values))
                for draws, values in zip(weights, stacked, strict=True)
            ]
        return np.asarray(metrics.model_utility(np.concatenate(means, axis=1)))

    value = metrics.model_utility(np.concatenate([np.nanmean(values, axis=0) for values in stacked]))
    rows = [(len(values), (clusters or {}).get(part)) for part, values in zip(sets, stacked, strict=True)]
    return resampled_estimates(utility, [float(value)], rows, samples, seed, name)[0]


def utility_metric(sets: Mapping[str, Sequence[FloatArray]], *, samples: int, seed: int, name: str) -> MetricValue:
    """`utility_estimate` of independent rows as a `MetricValue`."""
    return utility_estimate(sets, samples=samples, seed=seed, name=name).metric_value()


def forget_quality_estimates(
    ratio: FloatArray, retrained_ratio: FloatArray, *, samples: int, seed: int, name: str, clusters: Clusters = None
) -> list[ResampledValue]:
    """[p-value, statistic] of forget quality over the same forget rows of two models [rows], [rows].

    A resample draws rows, each with both models' ratios: the models answered the same questions.
    """
    known: dict[tuple[float, int], float] = {}

    def quality(weights: FloatArray) -> FloatArray:
        statistics = _ks_statistics(ratio, retrained_ratio, weights)
        keys = list(zip(statistics.round(12).tolist(), weights.sum(axis=1).astype(int).tolist(), strict=True))
        known.update({key: metrics.exact_ks_p_value(*key) for key in set(keys) - known.keys()})
        return np.stack([[known[key] for key in keys], statistics])

    values = metrics.forget_quality(ratio, retrained_ratio)
    return resampled_estimates(quality, values, [(len(ratio), clusters)], samples, seed, name)


def forget_quality_metrics(
    ratio: FloatArray, retrained_ratio: FloatArray, *, samples: int, seed: int, name: str, clusters: Clusters = None
) -> tuple[MetricValue, MetricValue]:
    """`forget_quality_estimates` as `MetricValue`s."""
    p_value, statistic = forget_quality_estimates(
        ratio, retrained_ratio, samples=samples, seed=seed, name=name, clusters=clusters
    )
    return p_value.metric_value(), statistic.metric_value()


def attack_metrics(
    forget: FloatArray,
    holdout: FloatArray,
    *,
    samples: int,
    seed: int,
    name: str,
    clusters: tuple[Clusters, Clusters] = (None, None),
) -> tuple[MetricValue, MetricValue]:
    """(AUC, TPR at 1 % FPR) of a membership score, [rows] each; the two sets are resampled independently."""

    def attack(members: FloatArray, others: FloatArray) -> FloatArray:
        curve = membership.roc(forget, holdout, (members, others))
        return np.stack([membership.area(*curve), membership.best_rate(*curve)])

    values = membership.attack_auc(forget, holdout), membership.tpr_at_fpr(forget, holdout)
    rows = list(zip((len(forget), len(holdout)), clusters, strict=True))
    auc, rate = resampled_estimates(attack, values, rows, samples, seed, name)
    return auc.metric_value(), rate.metric_value()


def privleak_metric(
    model: tuple[FloatArray, FloatArray],
    retrained: tuple[FloatArray, FloatArray],
    *,
    samples: int,
    seed: int,
    name: str,
    clusters: tuple[Clusters, Clusters] = (None, None),
) -> MetricValue:
    """PrivLeak of (forget, holdout) scores, of the same rows by both models; a row's two scores are drawn together."""
    auc, reference = membership.attack_auc(*model), membership.attack_auc(*retrained)
    if reference == 1.0:
        return MetricValue.absent("the retrained model's AUC is 1: PrivLeak divides by its distance from 1")

    def leak(*weights: FloatArray) -> FloatArray:
        pair = (weights[0], weights[1])
        areas = [membership.area(*membership.roc(*scores, pair)) for scores in (model, retrained)]
        return membership.privleak(*areas)

    rows = list(zip((len(model[0]), len(model[1])), clusters, strict=True))
    value = float(membership.privleak(auc, reference))
    return resampled_estimates(leak, [value], rows, samples, seed, name)[0].metric_value()


def variance_metric(estimates: Sequence[ResampledValue]) -> MetricValue:
    """Sample variance of a metric over probes; needs at least two. n counts probes, the interval is over rows."""
    if len(estimates) < 2:
        return MetricValue.absent("a variance needs two probes")
    value = float(np.var([estimate.value for estimate in estimates], ddof=1))
    resampled = [estimate.resampled for estimate in estimates if estimate.resampled is not None]
    draws = np.var(resampled, axis=0, ddof=1) if len(resampled) == len(estimates) else None
    return ResampledValue(value, draws, len(estimates)).metric_value()


def over_seeds(values: Sequence[float]) -> MetricValue:
    """Mean over seeds with its 95 % interval from Student's t; n counts seeds.

    The interval assumes roughly normal values. One seed gives no interval, none no value; both state the reason.
    """
    if not len(values):
        return MetricValue.absent("no seeds")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return MetricValue(mean, n=1, reason="one seed: no interval over seeds")
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return MetricValue(mean, mean - half, mean + half, n)


def difference_metric(one: MetricValue, other: MetricValue) -> MetricValue:
    """one - other of two independent values, with the interval built from theirs; absent if one of them is.

    MOVER: Zou and Donner 2008, https://doi.org/10.1002/sim.3095. For values of the same rows it is too wide.
    """
    for value in (one, other):
        if value.value is None:
            return value
    assert one.value is not None
    assert other.value is not None
    difference, n = one.value - other.value, (one.n or 0) + (other.n or 0)
    if one.low is None or one.high is None or other.low is None or other.high is None:
        lacking = one if one.low is None or one.high is None else other
        return MetricValue(difference, n=n, reason=lacking.reason or "one of the two values has no interval")
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return MetricValue(difference, difference - below, difference + above, n)


# -------------------------------------------------------------------------------------------------------- resamples


def resampled_estimates(
    statistic: Callable[..., FloatArray],
    values: Sequence[float],
    sets: Sequence[tuple[int, Clusters]],
    samples: int,
    seed: int,
    name: str,
) -> list[ResampledValue]:
    """The values with their resamples; `statistic` maps the weights of each set to [draws] or [values, draws]."""
    n = sum(rows for rows, _ in sets)
    places = [np.arange(rows) if labels is None else _numbered(labels) for rows, labels in sets]
    units = [int(place.max()) + 1 for place in places]
    counts = [unit for unit, (_, labels) in zip(units, sets, strict=True) if labels is not None]
    clusters = sum(counts) if counts else None
    if min(units) < 2:
        return [ResampledValue(float(value), None, n, clusters) for value in values]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    draws = zip(*(_resamples(unit, samples, rng, width=n) for unit in units), strict=True)
    blocks = [
        statistic(*(_counts(draw, unit)[:, place] for draw, unit, place in zip(block, units, places, strict=True)))
        for block in draws
    ]
    resampled = np.atleast_2d(np.concatenate(blocks, axis=-1))
    return [ResampledValue(float(value), row, n, clusters) for value, row in zip(values, resampled, strict=True)]


def _numbered(labels: NDArray[Any]) -> NDArray[np.int64]:
    """The number of each row's cluster, from 0."""
    return np.asarray(np.unique(labels, return_inverse=True)[1])


def _resamples(n: int, samples: int, rng: np.random.Generator, width: int = 0) -> Iterator[NDArray[np.int64]]:
    """Numbers below n drawn with replacement, [draws, n] in blocks of bounded memory; `samples` draws in total.

    `width`: values per draw in memory, if more than n.
    """
    block = max(1, _BLOCK_ELEMENTS // max(n, width, 1))
    for start in range(0, samples, block):
        yield rng.integers(0, n, size=(min(block, samples - start), n))


def _counts(draws: NDArray[np.int64], n: int) -> FloatArray:
    """How often each number below n occurs in each draw. [draws, drawn] -> [draws, n]."""
    places = draws + n * np.arange(len(draws))[:, None]
    return np.bincount(places.ravel(), minlength=n * len(draws)).reshape(len(draws), n).astype(np.float64)


def _ks_statistics(a: FloatArray, b: FloatArray, weights: FloatArray) -> FloatArray:
    """Kolmogorov-Smirnov statistics of two columns with the same row weights. [rows] x 2, [draws, rows] -> [draws].

    The distribution functions of all draws are cumulative counts over the pooled sorted values.
    """
    levels = np.unique(np.concatenate([a, b]))
    apart = np.abs(metrics.counts_up_to(a, levels, weights) - metrics.counts_up_to(b, levels, weights))
    return np.asarray(apart.max(axis=1) / weights.sum(axis=1))
