"""Which options a sweep tries next: a function of the seed, the trial's number and the results of earlier trials.

Nothing is kept between suggestions, so a killed sweep resumes as if it had not been killed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution

from ofmu_ray.config import SearchConfig, UnlearnConfig, apply_overrides
from ofmu_ray.metrics.fronts import number_of
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.search.priors import ZeroOrLogUniform, at
from ofmu_ray.search.spaces import Overrides, Space

ATTEMPTS = 50
"""Draws after which a space counts as exhausted."""
NEARBY = (0.8, 1.2)
"""Factors for changing a member's options (Jaderberg et al., 2017, arXiv 1711.09846)."""
RESAMPLE = 0.25
"""Probability of resampling a field of a changed member (ibid.)."""


@dataclass(frozen=True)
class Suggestion:
    """A trial to run."""

    number: int
    options: Overrides
    parent: int | None = None
    """Number of the trial whose weights it continues from (population)."""


@dataclass(frozen=True)
class EarlierTrial:
    """What is known about an earlier trial."""

    suggestion: Suggestion
    status: str
    """running, or as in its result."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Plain numbers by name for each intermediate evaluation; for a completed trial, the final one comes last."""
    flops: float | None = None


@dataclass(frozen=True)
class Search:
    """A search: what it varies, and its goal."""

    config: SearchConfig
    space: Space
    base: UnlearnConfig
    goal: Goal
    share: float = 1.0
    """Share of the floor that is enough for an unfinished trial."""

    def suggest(self, number: int, earlier: Sequence[EarlierTrial]) -> Suggestion | None:
        """The trial with this number; None: it depends on trials that are still running, or the space is exhausted.

        `earlier`: all trials with lower numbers, in order.
        """
        if self.config.kind == "population":
            return self._member(number, earlier)
        known = [one.suggestion.options for one in earlier]
        for attempt in range(ATTEMPTS):
            options = self._options(number, earlier, attempt)
            if options not in known:
                return Suggestion(number, options)
        return None

    def waits(self, number: int, earlier: Sequence[EarlierTrial]) -> bool:
        """Whether `suggest` returns None because the previous generation is still running."""
        if self.config.kind != "population":
            return False
        return any(one.status == "running" for one in self._generation_before(number, earlier))

    def _options(self, number: int, earlier: Sequence[EarlierTrial], attempt: int) -> Overrides:
        config = self.config
        if config.kind == "random" or number < config.startup_trials or attempt:
            return self.space.at(self._sobol(number + attempt * config.trials), self.base)
        return self._estimated(number, earlier)

    def _sobol(self, index: int) -> list[float]:
        from scipy.stats import qmc

        points = qmc.Sobol(len(self.space.knobs), rng=np.random.default_rng(self.config.seed))
        point = points.random_base2(index.bit_length())[index]  # the sequence's first points, in powers of two
        return [min(float(value), 1 - 1e-9) for value in point]

    # ------------------------------------------------------------------------------------------------------- Optuna

    def _estimated(self, number: int, earlier: Sequence[EarlierTrial]) -> Overrides:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        many = self.config.kind == "multi_objective"
        seed = int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group: fields with conditions
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, group=True)
        directions: list[Any] = ["maximize"] * (2 + self.config.cost if many else 1)
        study = optuna.create_study(directions=directions, sampler=sampler)
        study.add_trials([self._optuna_trial(one) for one in earlier])
        return self.space.ask(study.ask(), self.base)

    def _optuna_trial(self, one: EarlierTrial) -> Any:
        """An earlier trial as an Optuna trial."""
        from optuna.trial import TrialState, create_trial

        params, distributions = self.space.optuna_parameters(one.suggestion.options)
        known: dict[str, Any] = {"params": params, "distributions": distributions}
        if one.status == "running":
            return create_trial(state=TrialState.RUNNING, **known)
        heights = [self.goal.height(values) for values in one.metrics]
        utilities = [number_of(values, self.goal.utility) for values in one.metrics]
        measured = [(h, u) for h, u in zip(heights, utilities, strict=True) if h is not None and u is not None]
        if not measured or one.status == "failed":
            return create_trial(state=TrialState.FAIL, **known)
        height, utility = measured[-1]
        known["constraints"] = {"degenerate": float(self.goal.degenerate(one.metrics[-1]) or 0.0)}
        if self.config.kind == "multi_objective":  # stopped trials count with their last values
            cost = [-math.log10(max(one.flops or 1.0, 1.0))] if self.config.cost else []
            return create_trial(state=TrialState.COMPLETE, values=[height, utility, *cost], **known)
        missing = 0.0 if self.goal.floor is None else self._share(one) * self.goal.floor - utility
        known["constraints"]["utility below the floor"] = missing
        if one.status == "stopped":
            steps = {step: height for step, (height, _) in enumerate(measured, start=1)}
            return create_trial(state=TrialState.PRUNED, intermediate_values=steps, **known)
        return create_trial(state=TrialState.COMPLETE, value=height, **known)

    # --------------------------------------------------------------------------------------------------- population

    def _generation_before(self, number: int, earlier: Sequence[EarlierTrial]) -> Sequence[EarlierTrial]:
        first = number - number % self.config.population
        return earlier[first - self.config.population : first] if first else []

    def _member(self, number: int, earlier: Sequence[EarlierTrial]) -> Suggestion | None:
        """Synchronous population-based training: changed copies of the best members replace the worst."""
        before = self._generation_before(number, earlier)
        if not before:
            return Suggestion(number, self.space.at(self._sobol(number), self.base))
        if self.waits(number, earlier):
            return None
        ranked = sorted(before, key=lambda one: self.score(one), reverse=True)
        replaced = max(1, int(len(ranked) * self.config.quantile))
        able = [one for one in ranked if one.status == "stopped"]  # those that ended otherwise left no checkpoint
        if not able:
            return Suggestion(number, self.space.at(self._sobol(number), self.base))
        own = before[number % self.config.population]
        if own in able and own not in ranked[-replaced:]:
            return Suggestion(number, own.suggestion.options, own.suggestion.number)
        rng = np.random.default_rng([self.config.seed, number])
        parent = able[int(rng.integers(min(replaced, len(able))))].suggestion
        return Suggestion(number, self._changed(parent.options, rng), parent.number)

    def score(self, one: EarlierTrial) -> float:
        """The rule's score at the last evaluation; failed trials score below all others."""
        values = one.metrics[-1] if one.metrics and one.status != "failed" else {}
        return self.goal.score(values, self._share(one))

    def _share(self, one: EarlierTrial) -> float:
        return self.share if one.status == "stopped" else 1.0

    def _changed(self, options: Overrides, rng: np.random.Generator) -> Overrides:
        drawn = self.space.at([float(value) for value in rng.random(len(self.space.knobs))], self.base)
        changed: Overrides = {}
        for knob in self.space.knobs:
            resample, factor = rng.random() < RESAMPLE, float(rng.choice(NEARBY))
            value = options.get(knob.field)
            if value is None or resample or isinstance(knob.prior, CategoricalDistribution) or not value:
                if knob.field in drawn:
                    changed[knob.field] = drawn[knob.field]
                continue
            prior = knob.prior.positive if isinstance(knob.prior, ZeroOrLogUniform) else knob.prior
            moved = min(max(value * factor, at(prior, 0.0)), at(prior, 1 - 1e-9))
            changed[knob.field] = round(moved) if isinstance(knob.prior, IntDistribution) else float(f"{moved:.4g}")
        return self.space.with_meaning(changed, self.base)


def without_other_batches(space: Space, base: UnlearnConfig) -> tuple[Space, list[str]]:
    """The space without the fields that change which batches a round takes, and these fields' names.

    A member of a population continues from another member's weights and batches, so the batches must stay the same.
    """
    from ofmu_ray.methods import build_method

    def batches(changes: Overrides) -> Any:
        config = apply_overrides(base, changes)
        return build_method(config.method_options, config.training.rounds).batches_per_round()

    plain = batches({})
    fields = [
        knob.field
        for knob in space.knobs
        if any(batches({knob.field: at(knob.prior, quantile)}) != plain for quantile in (0.0, 0.5, 1 - 1e-9))
    ]
    return space.with_priors(dict.fromkeys(fields)), fields
