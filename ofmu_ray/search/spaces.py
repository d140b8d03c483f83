"""Search spaces over configuration fields: seeded draws, and conversion to and from Optuna's parameters.

A method's file lists its tuned fields; if there is a `tune_spaces/LABEL.py`, it has the label's space instead.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from ofmu_ray.config import SPACES, UnlearnConfig, apply_overrides, flatten
from ofmu_ray.config.overrides import value_at
from ofmu_ray.errors import UserError
from ofmu_ray.search.priors import (
    Prior,
    ZeroOrLogUniform,
    around,
    at,
    parse_prior,
    parse_priors,
    readable,
    scaled,
)

Overrides = dict[str, Any]
"""Dotted field -> value."""

ON = " is there"
"""Suffix for a field that may be 0: the Optuna parameter that says whether it is non-zero."""
_SWITCH = CategoricalDistribution((False, True))


@dataclass(frozen=True)
class Knob:
    """A tuned field."""

    field: str
    """Dotted name in UnlearnConfig."""
    prior: Prior
    why: str
    """Source of the range."""
    given: str | None = None
    """Field that this one depends on: this one is drawn only if that one is neither 0 nor null."""


@dataclass(frozen=True)
class Space:
    """The tuned fields of a method."""

    knobs: tuple[Knob, ...]

    @classmethod
    def of(cls, method: str) -> Space:
        """The space in the method's file. Learning rates are for models of 1 B parameters and more (see `scaled`)."""
        ranges = SPACES[method].items()
        return cls(tuple(Knob(f"{method}.{name}", parse_prior(text), why) for name, (text, why) in ranges))

    def draws(self, count: int, seed: int | Sequence[int], base: UnlearnConfig) -> list[Overrides]:
        """`count` draws, reproducible by seed: a Latin hypercube, so that few draws still cover each range.

        Each field's range is divided into `count` parts of equal probability. Each part is drawn from once, in an order
        specific to the field. (Not scipy.stats.qmc.LatinHypercube: its draws differ, and benchmarks identify runs to
        reuse by their draws.) `base`: the configuration that the draws will be applied to, for `Knob.given`.
        """
        rng = np.random.default_rng(seed)
        columns = [(rng.permutation(count) + rng.random(count)) / count for _ in self.knobs]
        return [self.at([float(column[index]) for column in columns], base) for index in range(count)]

    def at(self, quantiles: Sequence[float], base: UnlearnConfig) -> Overrides:
        """The values at one quantile per knob, in knob order; `base` as in `draws`."""
        drawn = {knob.field: at(knob.prior, quantile) for knob, quantile in zip(self.knobs, quantiles, strict=True)}
        return self.with_meaning(drawn, base)

    def with_meaning(self, drawn: Overrides, base: UnlearnConfig) -> Overrides:
        """`drawn` without the fields whose `given` is 0 or null there (or in `base`, if it was not drawn)."""
        given = {knob.field: knob.given for knob in self.knobs}

        def applies(field: str | None) -> bool:
            return field is None or bool(drawn.get(field, value_at(base, field)))

        return {field: value for field, value in drawn.items() if applies(given.get(field))}

    def ask(self, trial: Trial, base: UnlearnConfig) -> Overrides:
        """Values that Optuna suggests; conditional fields only if they apply. `base` as in `draws`."""
        drawn: Overrides = {}
        for knob in sorted(self.knobs, key=lambda knob: knob.given is not None):  # fields that others depend on first
            if knob.given is not None and not drawn.get(knob.given, value_at(base, knob.given)):
                continue
            prior = knob.prior
            if isinstance(prior, ZeroOrLogUniform):
                if not trial.suggest_categorical(knob.field + ON, _SWITCH.choices):
                    drawn[knob.field] = 0.0
                    continue
                prior = prior.positive
            drawn[knob.field] = readable(_suggest(trial, knob.field, prior))
        return drawn

    def optuna_parameters(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Optuna's parameters and distributions for a trial with these options."""
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for knob in self.knobs:
            if knob.field not in options:
                continue
            prior, value = knob.prior, options[knob.field]
            if isinstance(prior, ZeroOrLogUniform):
                params[knob.field + ON], distributions[knob.field + ON] = value != 0, _SWITCH
                if value == 0:
                    continue
                prior = prior.positive
            if isinstance(prior, FloatDistribution):  # rounding may have crossed an end
                value = min(max(value, prior.low), prior.high)
            params[knob.field], distributions[knob.field] = value, prior
        return params, distributions

    def scaled(self, factor: float) -> Space:
        """Learning rates times `factor`."""
        return Space(
            tuple(
                dataclasses.replace(knob, prior=scaled(knob.prior, factor)) if knob.field.endswith(".lr") else knob
                for knob in self.knobs
            )
        )

    def with_priors(self, priors: Mapping[str, Prior | None], why: str = "the user's") -> Space:
        """The space with priors replaced, added or removed (null); `why` is their source."""
        known = {knob.field for knob in self.knobs}
        kept = [
            dataclasses.replace(knob, prior=prior, why=why) if (prior := priors.get(knob.field)) else knob
            for knob in self.knobs
            if priors.get(knob.field, knob.prior) is not None
        ]
        new = [Knob(field, prior, why) for field, prior in priors.items() if prior and field not in known]
        return Space((*kept, *new))

    def around(self, options: Overrides, why: str) -> Space:
        """The space narrowed to a quarter of each field's range around its value in `options`, clipped to the prior.

        Log-uniform priors use the logarithm's range. A choice is fixed to its value; fields that were not drawn are
        removed.
        """
        priors: dict[str, Prior | None] = {
            knob.field: around(knob.prior, options[knob.field]) if knob.field in options else None
            for knob in self.knobs
        }
        return self.with_priors(priors, why)

    def check(self, base: UnlearnConfig) -> None:
        """Check that every field exists and takes its prior's values, or raise UserError with the closest field."""
        for knob in self.knobs:
            for quantile in (0.0, 0.5, 1.0 - 1e-9):
                apply_overrides(base, {knob.field: at(knob.prior, quantile)})
            if knob.given is not None:
                value_at(base, knob.given)


def _suggest(trial: Trial, name: str, prior: Prior) -> Any:
    if isinstance(prior, FloatDistribution):
        return trial.suggest_float(name, prior.low, prior.high, log=prior.log)
    if isinstance(prior, IntDistribution):
        return trial.suggest_int(name, prior.low, prior.high)
    assert isinstance(prior, CategoricalDistribution)
    return trial.suggest_categorical(name, prior.choices)


def space_for(label: str, base: UnlearnConfig, lr_scale: float = 1.0) -> Space:
    """The space of a label: `tune_spaces/LABEL.py`, or else its method's space; learning rates times `lr_scale`."""
    space = Space.of(base.method)
    if label.isidentifier() and importlib.util.find_spec(f"tune_spaces.{label}"):
        space = importlib.import_module(f"tune_spaces.{label}").SPACE
    return space.scaled(lr_scale)


def read_space(path: str, space: Space) -> Space:
    """Apply a file to `space`: YAML with priors by field, or Python with a `SPACE`, which replaces it.

    A Python file is executed, and only because the user names it.

    Raises:
        UserError: no such file, another kind of file, or not a space.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"space_file = {path!r}: no such file")
    if file.suffix == ".py":
        space_of_file = runpy.run_path(str(file)).get("SPACE")
        if not isinstance(space_of_file, Space) or not all(isinstance(knob, Knob) for knob in space_of_file.knobs):
            raise UserError(f"space_file = {path!r}: it must define SPACE, a tune_spaces.Space of Knobs")
        return space_of_file
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"space_file = {path!r}: name a .yaml file of priors by field, or a .py file with a SPACE")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"space_file = {path!r}: not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"space_file = {path!r}: must contain priors by field, such as 'ofmu.beta: loguniform(1e-3, 1)'"
        )
    return space.with_priors(parse_priors(flatten(content), option=path), f"from {file.name}")
