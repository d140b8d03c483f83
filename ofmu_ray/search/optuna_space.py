"""A search space in Optuna's words: what its samplers suggest, and what they are told of earlier trials.

A field with a prior `zero_or_loguniform` is two parameters: whether it is there, and its value if it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from ofmu_ray.config import UnlearnConfig
from ofmu_ray.config.overrides import value_at
from ofmu_ray.config.spaces import Choice, Integers, LogUniform, Overrides, Prior, Space, Uniform, ZeroOrLogUniform

ON = " is there"
"""Added to a field's name: the parameter that says whether it is other than 0."""


def ask(space: Space, trial: Trial, base: UnlearnConfig) -> Overrides:
    """Values of the fields, conditional ones only where they have a meaning. `base` as in `Space.draws`."""
    drawn: Overrides = {}
    for knob in sorted(space.knobs, key=lambda knob: knob.given is not None):  # what others depend on comes first
        if knob.given is not None and not drawn.get(knob.given, value_at(base, knob.given)):
            continue
        prior = knob.prior
        if isinstance(prior, ZeroOrLogUniform):
            if not trial.suggest_categorical(knob.field + ON, _SWITCH.choices):
                drawn[knob.field] = 0.0
                continue
            prior = prior.positive
        value = _suggest(trial, knob.field, prior)
        # four digits, as in Space.draws: a value that a person can read and give again on the command line
        drawn[knob.field] = float(f"{value:.4g}") if isinstance(value, float) else value
    return drawn


def told(space: Space, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """Parameters and their distributions of a trial that had these options."""
    params: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for knob in space.knobs:
        if knob.field not in options:
            continue
        prior, value = knob.prior, options[knob.field]
        if isinstance(prior, ZeroOrLogUniform):
            params[knob.field + ON], distributions[knob.field + ON] = value != 0, _SWITCH
            if value == 0:
                continue
            prior = prior.positive
        distribution = _distribution(prior)
        if isinstance(distribution, FloatDistribution):  # rounding may have stepped over an end
            value = min(max(value, distribution.low), distribution.high)
        params[knob.field], distributions[knob.field] = value, distribution
    return params, distributions


def _suggest(trial: Trial, name: str, prior: Prior) -> Any:
    distribution = _distribution(prior)
    if isinstance(distribution, FloatDistribution):
        return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    assert isinstance(distribution, CategoricalDistribution)
    return trial.suggest_categorical(name, distribution.choices)


_SWITCH = CategoricalDistribution((False, True))


def _distribution(prior: Prior) -> BaseDistribution:
    if isinstance(prior, LogUniform):
        return FloatDistribution(prior.low, prior.high, log=True)
    if isinstance(prior, Uniform):
        return FloatDistribution(prior.low, prior.high)
    if isinstance(prior, Integers):
        return IntDistribution(prior.low, prior.high)
    assert isinstance(prior, Choice), f"a prior that Optuna has no word for: {prior}"
    return CategoricalDistribution(prior.options)
