"""Which options a sweep tries next: a function of the seed, of the trial's number and of what earlier trials found.

Nothing is remembered between suggestions, so that a sweep that was killed goes on as if it had not been.
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
"""Draws after which a space is taken to hold nothing new."""
NEARBY = (0.8, 1.2)
"""Factors of a member's change (Jaderberg et al., 2017, arXiv 1711.09846)."""
RESAMPLE = 0.25
"""Probability of drawing a field of a changed member anew (ibid.)."""


@dataclass(frozen=True)
class Suggestion:
    """A trial that is to be done."""

    number: int
    options: Overrides
    parent: int | None = None
    """Number of the trial whose weights it goes on from (population)."""


@dataclass(frozen=True)
class EarlierTrial:
    """What is known of an earlier trial."""

    suggestion: Suggestion
    status: str
    """running, or as in its result."""
    figures: Sequence[Mapping[str, Any]] = ()
    """Plain numbers by name, of each evaluation on the way; of a trial that came to its end, the last."""
    flops: float | None = None


@dataclass(frozen=True)
class Search:
    """A search: what it varies, and what it is after."""

    config: SearchConfig
    space: Space
    base: UnlearnConfig
    goal: Goal
    share: float = 1.0
    """Of the floor that is enough for a trial that has not come to its end."""

    def suggest(self, number: int, seen: Sequence[EarlierTrial]) -> Suggestion | None:
        """The trial of this number; None: it follows from trials that still run, or the space holds nothing new.

        `seen`: all trials of lower numbers, in their order.
        """
        if self.config.kind == "population":
            return self._member(number, seen)
        known = [one.suggestion.options for one in seen]
        for attempt in range(ATTEMPTS):
            options = self._options(number, seen, attempt)
            if options not in known:
                return Suggestion(number, options)
        return None

    def waits(self, number: int, seen: Sequence[EarlierTrial]) -> bool:
        """Whether `suggest` gives None because the generation before this trial's still runs."""
        if self.config.kind != "population":
            return False
        return any(one.status == "running" for one in self._generation_before(number, seen))

    def _options(self, number: int, seen: Sequence[EarlierTrial], attempt: int) -> Overrides:
        config = self.config
        if config.kind == "random" or number < config.startup_trials or attempt:
            return self.space.at(self._sobol(number + attempt * config.trials), self.base)
        return self._estimated(number, seen)

    def _sobol(self, index: int) -> list[float]:
        from scipy.stats import qmc

        points = qmc.Sobol(len(self.space.knobs), rng=np.random.default_rng(self.config.seed))
        found = points.random_base2(index.bit_length())[index]  # the sequence's first points, in powers of two
        return [min(float(value), 1 - 1e-9) for value in found]

    # ------------------------------------------------------------------------------------------------------- Optuna

    def _estimated(self, number: int, seen: Sequence[EarlierTrial]) -> Overrides:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        many = self.config.kind == "multi_objective"
        seed = int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group: fields with conditions
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, group=True)
        directions: list[Any] = ["maximize"] * (2 + self.config.cost if many else 1)
        study = optuna.create_study(directions=directions, sampler=sampler)
        study.add_trials([self._told(one) for one in seen])
        return self.space.ask(study.ask(), self.base)

    def _told(self, one: EarlierTrial) -> Any:
        """An earlier trial as Optuna knows trials."""
        from optuna.trial import TrialState, create_trial

        params, distributions = self.space.told(one.suggestion.options)
        known: dict[str, Any] = {"params": params, "distributions": distributions}
        if one.status == "running":
            return create_trial(state=TrialState.RUNNING, **known)
        heights = [self.goal.height(figures) for figures in one.figures]
        utilities = [number_of(figures, self.goal.utility) for figures in one.figures]
        measured = [(h, u) for h, u in zip(heights, utilities, strict=True) if h is not None and u is not None]
        if not measured or one.status == "failed":
            return create_trial(state=TrialState.FAIL, **known)
        height, utility = measured[-1]
        known["constraints"] = {"degenerate": float(self.goal.degenerate(one.figures[-1]) or 0.0)}
        if self.config.kind == "multi_objective":  # what ended early counts with what it had reached
            cost = [-math.log10(max(one.flops or 1.0, 1.0))] if self.config.cost else []
            return create_trial(state=TrialState.COMPLETE, values=[height, utility, *cost], **known)
        missing = 0.0 if self.goal.floor is None else self._share(one) * self.goal.floor - utility
        known["constraints"]["utility below the floor"] = missing
        if one.status == "stopped":
            steps = {step: height for step, (height, _) in enumerate(measured, start=1)}
            return create_trial(state=TrialState.PRUNED, intermediate_values=steps, **known)
        return create_trial(state=TrialState.COMPLETE, value=height, **known)

    # --------------------------------------------------------------------------------------------------- population

    def _generation_before(self, number: int, seen: Sequence[EarlierTrial]) -> Sequence[EarlierTrial]:
        first = number - number % self.config.population
        return seen[first - self.config.population : first] if first else []

    def _member(self, number: int, seen: Sequence[EarlierTrial]) -> Suggestion | None:
        """Synchronous population-based training: the worst members become changed copies of the best."""
        before = self._generation_before(number, seen)
        if not before:
            return Suggestion(number, self.space.at(self._sobol(number), self.base))
        if self.waits(number, seen):
            return None
        ranked = sorted(before, key=lambda one: self.score(one), reverse=True)
        replaced = max(1, int(len(ranked) * self.config.quantile))
        own = before[number % self.config.population]
        if own not in ranked[-replaced:]:
            return Suggestion(number, own.suggestion.options, own.suggestion.number)
        rng = np.random.default_rng([self.config.seed, number])
        parent = ranked[int(rng.integers(replaced))].suggestion
        return Suggestion(number, self._changed(parent.options, rng), parent.number)

    def score(self, one: EarlierTrial) -> float:
        """The rule's score at the last evaluation; failed trials are below all others."""
        figures = one.figures[-1] if one.figures and one.status != "failed" else {}
        return self.goal.score(figures, self._share(one))

    def _share(self, one: EarlierTrial) -> float:
        return self.share if one.status == "stopped" else 1.0

    def _changed(self, options: Overrides, rng: np.random.Generator) -> Overrides:
        drawn = self.space.at([float(value) for value in rng.random(len(self.space.knobs))], self.base)
        changed: Overrides = {}
        for knob in self.space.knobs:
            anew, factor = rng.random() < RESAMPLE, float(rng.choice(NEARBY))
            value = options.get(knob.field)
            if value is None or anew or isinstance(knob.prior, CategoricalDistribution) or not value:
                if knob.field in drawn:
                    changed[knob.field] = drawn[knob.field]
                continue
            prior = knob.prior.positive if isinstance(knob.prior, ZeroOrLogUniform) else knob.prior
            moved = min(max(value * factor, at(prior, 0.0)), at(prior, 1 - 1e-9))
            changed[knob.field] = round(moved) if isinstance(knob.prior, IntDistribution) else float(f"{moved:.4g}")
        return self.space.with_meaning(changed, self.base)


def without_other_batches(space: Space, base: UnlearnConfig) -> tuple[Space, list[str]]:
    """The space without the fields that change which batches a round takes, and their names.

    A member of a population goes on from another one's weights and batches, so that these must stay.
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
