"""How much each tuned option mattered: PED-ANOVA over the finished trials of a search, with its uncertainty.

PED-ANOVA (Watanabe et al., 2023, arXiv 2304.10255; for conditional options arXiv 2601.20800) measures how far an
option's values in the best trials differ from those in all trials: the Pearson divergence between two densities. It
needs no surrogate model and no scikit-learn, and accepts options that only some trials have.

Limits. Few trials are enough for the most important option; the order of the others needs hundreds
(docs/decisions.md). It looks at one option at a time: if two options matter only together, it sees the average effect
of each. It describes the trials at hand: an option looks unimportant if its range is too narrow or the search soon left
its bad values. A search that learns (TPE) draws options in patterns that the permutation test does not model, so the
p-values are too small. Runs that a scheduler stopped have no comparable metrics and are excluded.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ofmu_ray.metrics.functions import FloatArray

MINIMUM_TRIALS = 20
"""With fewer, PED-ANOVA finds the most important of six options in less than nine of ten searches
(docs/decisions.md)."""
RELIABLE_ORDER = 100
"""With fewer, the option in second place is often not the second most important."""
BEST = 0.5
"""Fraction of the trials that count as best; the upper half ranks options best up to about 50 trials."""


@dataclass(frozen=True)
class Importance:
    """The contribution of one option to an outcome."""

    option: str
    trials: int
    """Trials that have it."""
    share: float
    """Share of the total importance; all shares sum to 1."""
    low: float
    """95 % interval of the share: percentile bootstrap over trials, widened to include the share. Resamples have fewer
    distinct trials and more noise, which shifts them towards equal shares. It never reaches 0: see `p_value`."""
    high: float
    p_value: float
    """How often any option looks as important when outcomes are shuffled over the trials (Westfall and Young)."""


def importances(
    options: Sequence[Mapping[str, Any]],
    goodness: Sequence[float],
    space: Sequence[Mapping[str, Any]],
    *,
    samples: int = 100,
    seed: int = 0,
) -> list[Importance] | None:
    """Importance of each option in the space that varies, largest first.

    Args:
        options: per finished trial, dotted field -> value; a field that is absent did not apply to the trial.
        goodness: outcome per trial, higher is better. Only its order counts.
        space: what was tuned: `field` and `prior` (text). Under a logarithmic prior the logarithm counts; 0 is placed
            a decade below the lowest positive value.
        samples: resamples for the interval, and shuffles for the p-value, which is at least 1 / (samples + 1).

    Returns:
        None with fewer than MINIMUM_TRIALS trials, or if the outcome or all options are constant.
    """
    values = np.asarray(goodness, dtype=np.float64)
    columns = {
        str(knob["field"]): column
        for knob in space
        if (column := _column([trial.get(knob["field"]) for trial in options], str(knob["prior"]))) is not None
    }
    count = len(values)
    if count < MINIMUM_TRIALS or len(np.unique(values)) < 2 or not columns:
        return None
    rng = np.random.default_rng(seed)
    # how often each trial occurs in a resample
    weights = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(samples)]
    search = _Search(columns, copies=max(int(weight.max()) for weight in weights))
    once = np.ones(count, dtype=np.int64)
    with warnings.catch_warnings():  # about low targets, and about options that few trials of a resample have
        warnings.simplefilter("ignore")
        observed = search.divergences(values, once)
        resampled = np.array([search.divergences(values, weight) for weight in weights])
        shuffled = np.array([search.divergences(rng.permutation(values), once) for _ in range(samples)])
    if not observed.sum():
        return None
    totals = resampled.sum(axis=1, keepdims=True)
    low, high = np.percentile((resampled / np.where(totals, totals, 1.0))[totals[:, 0] > 0], (2.5, 97.5), axis=0)
    # compare with the largest of all options in each shuffle, each in units of its mean under chance
    chance = np.where(shuffled.any(axis=0), shuffled.mean(axis=0), 1.0)
    largest = (shuffled / chance).max(axis=1)
    p_values = (1 + (largest[:, None] >= observed / chance).sum(axis=0)) / (1 + samples)
    shares = observed / observed.sum()
    low, high = np.minimum(low, shares), np.maximum(high, shares)
    rows = [
        Importance(name, columns[name].count, *(float(part[index]) for part in (shares, low, high, p_values)))
        for index, name in enumerate(columns)
    ]
    return sorted(rows, key=lambda row: -row.share)


@dataclass(frozen=True)
class _Column:
    """One option over the trials. NaN: absent."""

    values: FloatArray
    """[trials]; for a choice, the index of the chosen value."""
    kind: Literal["real", "whole", "choice"]

    @property
    def count(self) -> int:
        return int(np.isfinite(self.values).sum())


def _column(raw: Sequence[Any], prior: str) -> _Column | None:
    """None if there are fewer than two distinct values."""
    kept = [value for value in raw if value is not None]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in kept)
    if prior.startswith("choice") or not numeric:  # null may be a choice
        names = [None if value is None and not prior.startswith("choice") else json.dumps(value) for value in raw]
        order = list(dict.fromkeys(name for name in names if name is not None))
        values = np.array([math.nan if name is None else float(order.index(name)) for name in names])
        column = _Column(values, "choice")
    else:
        values = np.array([math.nan if value is None else float(value) for value in raw])
        if "loguniform" in prior and (values > 0).any():
            values = _logarithms(values)
        column = _Column(values, "whole" if prior.startswith("integer") else "real")
    return column if len(np.unique(values[np.isfinite(values)])) > 1 else None


def _logarithms(values: FloatArray) -> FloatArray:
    """log10; values that are not positive go a decade below the lowest positive one. NaN stays."""
    positive = values > 0
    lowest = math.log10(values[positive].min()) - 1.0
    logarithms = np.where(np.isnan(values), math.nan, lowest)
    logarithms[positive] = np.log10(values[positive])
    return logarithms


class _Search:
    """The trials as one Optuna study with `copies` of each trial; a target of NaN excludes a copy.

    Setting up a study costs as much as evaluating it, so one study serves all resamples and shuffles.
    """

    def __init__(self, columns: Mapping[str, _Column], copies: int) -> None:
        import optuna
        from optuna.importance import PedAnovaImportanceEvaluator

        self._names = list(columns)
        self._evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST)
        priors = {name: _distribution(column) for name, column in columns.items()}
        rows = zip(*(column.values.tolist() for column in columns.values()), strict=True)
        drawn = [
            {name: value for name, value in zip(columns, row, strict=True) if not math.isnan(value)} for row in rows
        ]
        whole = {name for name, column in columns.items() if column.kind != "real"}
        trials = [
            optuna.trial.create_trial(
                params={name: int(value) if name in whole else value for name, value in row.items()},
                distributions={name: priors[name] for name in row},
                value=0.0,
            )
            for row in drawn
            for _ in range(copies)
        ]
        self._trial = np.repeat(np.arange(len(drawn)), copies)
        self._copy = np.tile(np.arange(copies), len(drawn))
        self._study = quiet_study("minimize")
        self._study.add_trials(trials)

    def divergences(self, goodness: FloatArray, weights: NDArray[np.int64]) -> FloatArray:
        """PED-ANOVA's importance of each option, unnormalised [options]; `weights`: how often each trial counts."""
        losses = np.where(self._copy < weights[self._trial], -goodness[self._trial], math.nan)
        result = self._evaluator.evaluate(self._study, self._names, target=lambda trial: float(losses[trial.number]))
        return np.array([result[name] for name in self._names])


def quiet_study(direction: Literal["minimize", "maximize"]) -> Any:
    """A temporary Optuna study, created without log lines."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction=direction)
    finally:
        optuna.logging.set_verbosity(level)


def _distribution(column: _Column) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    low, high = np.nanmin(column.values), np.nanmax(column.values)
    if column.kind == "choice":
        return CategoricalDistribution(list(range(int(high) + 1)))
    return IntDistribution(int(low), int(high)) if column.kind == "whole" else FloatDistribution(low, high)
