"""Figures with 95 % intervals: percentile bootstrap over rows, seeded and vectorised."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofmu_ray.evaluation import metrics
from ofmu_ray.evaluation.metrics import FloatArray

_BLOCK_ELEMENTS = 1 << 22  # resampled values held at once (32 MiB of float64)


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval and the rows behind it; or no number, and the reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    reason: str | None = None

    @classmethod
    def absent(cls, reason: str) -> Figure:
        return cls(value=None, reason=reason)

    def to_json(self) -> dict[str, float | int | str | None]:
        """`{"value", "low", "high", "n"}`, or `{"value": None, "reason"}`."""
        if self.value is None:
            return {"value": None, "reason": self.reason}
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def mean_figure(values: FloatArray, *, samples: int, seed: int, name: str) -> Figure:
    """Mean over rows. `name` separates the random streams of the figures that share a seed."""
    draws = [values[rows].mean(axis=1) for rows in _resamples(len(values), samples, _rng(seed, name))]
    return _figure(float(values.mean()), np.concatenate(draws), len(values))


def utility_figure(sets: Mapping[str, Sequence[FloatArray]], *, samples: int, seed: int, name: str) -> Figure:
    """Model utility: the sets' rows are resampled independently, a row's three values together.

    `sets` maps a set to its three columns [rows] (NaN: the row lacks this value); n counts the rows of all sets.
    """
    rng = _rng(seed, name)
    means, draws = [], []
    for columns in sets.values():
        stacked = np.stack(columns)  # [3, rows]
        means.append(np.nanmean(stacked, axis=1))
        blocks = [np.nanmean(stacked[:, rows], axis=2) for rows in _resamples(stacked.shape[1], samples, rng)]
        draws.append(np.concatenate(blocks, axis=1))
    utility = metrics.model_utility(np.concatenate(means))
    resampled = metrics.model_utility(np.concatenate(draws).T)
    return _figure(float(utility), np.asarray(resampled), sum(len(columns[0]) for columns in sets.values()))


def forget_quality_figures(
    ratio: FloatArray, retrained_ratio: FloatArray, *, samples: int, seed: int, name: str
) -> tuple[Figure, Figure]:
    """(p-value, statistic) of forget quality over the same forget rows of two models [rows], [rows].

    A resample draws rows, and with each row both models' ratios: the models answered the same questions.
    """
    p_value, statistic = metrics.forget_quality(ratio, retrained_ratio)
    statistics = np.empty(samples)
    p_values = np.empty(samples)
    done = 0
    known: dict[float, float] = {}  # the p-value depends on the statistic and the sizes only
    for rows in _resamples(len(ratio), samples, _rng(seed, name)):
        for draw, found in zip(rows, _ks_statistics(ratio, retrained_ratio, rows), strict=True):
            key = round(float(found), 12)
            if key not in known:
                known[key] = metrics.forget_quality(ratio[draw], retrained_ratio[draw])[0]
            statistics[done], p_values[done] = found, known[key]
            done += 1
    n = len(ratio)
    return _figure(p_value, p_values, n), _figure(statistic, statistics, n)


def _ks_statistics(a: FloatArray, b: FloatArray, rows: NDArray[np.int64]) -> FloatArray:
    """Kolmogorov-Smirnov statistics of (a[draw], b[draw]) for each draw. [rows], [rows], [draws, rows] -> [draws].

    The distribution functions of all draws are cumulative counts over the pooled sorted values.
    """
    levels, positions = np.unique(np.concatenate([a, b]), return_inverse=True)
    steps = np.zeros((len(rows), len(levels)))
    draw = np.arange(len(rows))[:, None]
    np.add.at(steps, (draw, positions[: len(a)][rows]), 1.0)
    np.add.at(steps, (draw, positions[len(a) :][rows]), -1.0)
    return np.asarray(np.abs(np.cumsum(steps, axis=1)).max(axis=1) / rows.shape[1])


def _resamples(n: int, samples: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Row numbers drawn with replacement, [draws, n] in blocks of bounded memory; `samples` draws in all."""
    block = max(1, _BLOCK_ELEMENTS // max(n, 1))
    for start in range(0, samples, block):
        yield rng.integers(0, n, size=(min(block, samples - start), n))


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _figure(value: float, resampled: FloatArray, n: int) -> Figure:
    low, high = (float(bound) for bound in np.nanpercentile(resampled, [2.5, 97.5]))
    # resampling biases the KS statistic upwards: the interval is widened to hold the figure itself
    return Figure(value, min(low, value), max(high, value), n)
