"""Search spaces over fields of a configuration: priors and seeded draws.

A space names the fields that `ofmu unlearn` takes (`npo.optimizer.lr`), each with a prior and the source of its range.
`ofmu benchmark` and `ofmu sweep` draw from it; `optuna_space` says it in Optuna's words.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ofmu_ray.config.values import close_match
from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    from ofmu_ray.config import UnlearnConfig

Overrides = dict[str, Any]
"""Dotted field -> value."""


NEAR = 1 / 8
"""Share of a range to either side of a value that counts as near it."""


class Prior(Protocol):
    """A distribution of one field's values; `str` of it is what `parse_prior` reads."""

    def at(self, quantile: float) -> Any:
        """The value at a quantile in [0, 1)."""


@dataclass(frozen=True)
class LogUniform:
    """Uniform in the logarithm, from `low` to `high`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require(0 < self.low <= self.high, self, "0 < low <= high")

    def at(self, quantile: float) -> float:
        # four digits: a value that a person can read and give again on the command line
        return float(f"{self.low * (self.high / self.low) ** quantile:.4g}")

    def __str__(self) -> str:
        return f"loguniform({self.low:g}, {self.high:g})"

    def times(self, factor: float) -> LogUniform:
        """Both ends times a factor."""
        return LogUniform(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class ZeroOrLogUniform:
    """0 with probability `zero`, else uniform in the logarithm from `low` to `high`: a term that may be left out."""

    low: float
    high: float
    zero: float = 0.25

    def __post_init__(self) -> None:
        _require(0 < self.low <= self.high and 0 < self.zero < 1, self, "0 < low <= high and 0 < zero < 1")

    @property
    def positive(self) -> LogUniform:
        """The distribution of values that are not 0."""
        return LogUniform(self.low, self.high)

    def at(self, quantile: float) -> float:
        return 0.0 if quantile < self.zero else self.positive.at((quantile - self.zero) / (1 - self.zero))

    def __str__(self) -> str:
        share = "" if self.zero == ZeroOrLogUniform.zero else f", {self.zero:g}"
        return f"zero_or_loguniform({self.low:g}, {self.high:g}{share})"


@dataclass(frozen=True)
class Uniform:
    """Uniform from `low` to `high`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require(self.low <= self.high, self, "low <= high")

    def at(self, quantile: float) -> float:
        return float(f"{self.low + (self.high - self.low) * quantile:.4g}")

    def __str__(self) -> str:
        return f"uniform({self.low:g}, {self.high:g})"


@dataclass(frozen=True)
class Integers:
    """Whole numbers from `low` to `high`, both included, equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        _require(whole and self.low <= self.high, self, "whole numbers with low <= high")

    def at(self, quantile: float) -> int:
        return self.low + math.floor(quantile * (self.high - self.low + 1))

    def __str__(self) -> str:
        return f"integer({self.low}, {self.high})"


@dataclass(frozen=True)
class Choice:
    """One of the options, equally likely."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        _require(bool(self.options), self, "at least one option")

    def at(self, quantile: float) -> Any:
        return self.options[math.floor(quantile * len(self.options))]

    def __str__(self) -> str:
        return f"choice({', '.join('null' if option is None else str(option) for option in self.options)})"


def _around(prior: Prior, value: Any) -> Prior:
    """A quarter of the prior's range, around a value."""
    if isinstance(prior, ZeroOrLogUniform) and value:
        prior = prior.positive
    if isinstance(prior, LogUniform):
        factor = (prior.high / prior.low) ** NEAR
        return LogUniform(max(prior.low, value / factor), min(prior.high, value * factor))
    if isinstance(prior, Uniform):
        reach = NEAR * (prior.high - prior.low)
        return Uniform(max(prior.low, value - reach), min(prior.high, value + reach))
    if isinstance(prior, Integers):
        steps = max(1, round(NEAR * (prior.high - prior.low)))
        return Integers(max(prior.low, value - steps), min(prior.high, value + steps))
    return Choice((value,))


def _require(condition: bool, prior: object, need: str) -> None:
    if not condition:
        raise UserError(f"prior {prior}: must have {need}")


def parse_prior(text: str) -> Prior:
    """`loguniform(1e-5, 1e-3)`, `uniform(0, 1)`, `integer(2, 8)`, `zero_or_loguniform(1e-5, 1e-2)` (0 in a quarter of
    the draws, or in the share that stands third) or `choice(a, 2, null)` (as YAML reads the options).

    Raises:
        UserError: anything else.
    """
    import yaml

    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    kinds: dict[str, type[Any]] = {
        "loguniform": LogUniform,
        "uniform": Uniform,
        "integer": Integers,
        "zero_or_loguniform": ZeroOrLogUniform,
        "choice": Choice,
    }
    if match is None or match[1] not in kinds:
        hint = close_match(match[1], kinds) if match else ""
        raise UserError(
            f"prior {text!r}:{hint} write loguniform(LOW, HIGH), uniform(LOW, HIGH), integer(LOW, HIGH), "
            "zero_or_loguniform(LOW, HIGH) or choice(A, B, ...)"
        )
    # YAML 1.1 reads 1e-5 as text
    options = tuple(_number(value) for value in yaml.safe_load(f"[{match[2]}]"))
    if match[1] == "choice":
        return Choice(options)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in options)
    if len(options) not in ((2, 3) if match[1] == "zero_or_loguniform" else (2,)) or not numbers:
        raise UserError(f"prior {text!r}: {match[1]} takes two numbers, the lowest and the highest")
    prior: Prior = kinds[match[1]](*options)
    return prior


def parse_priors(texts: Mapping[str, Any], *, option: str) -> dict[str, Prior | None]:
    """Priors by dotted field from their texts; null: the field is not tuned.

    Raises:
        UserError: not a prior, naming `option` and the field.
    """
    found: dict[str, Prior | None] = {}
    for field, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UserError(f"{option}: {field} = {text!r} is not a prior; write loguniform(LOW, HIGH) and the like")
        try:
            found[field] = None if text is None else parse_prior(text)
        except UserError as error:
            raise UserError(f"{option}: {field}: {error}") from None
    return found


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass(frozen=True)
class Knob:
    """A field that is tuned."""

    field: str
    """Dotted name in UnlearnConfig."""
    prior: Prior
    why: str
    """Where the range comes from."""
    given: str | None = None
    """Field without which this one has no meaning: it is drawn only where that one is not 0 and not null."""


NEAR_ONE = "from half to ten times the weight of the forget loss (OpenUnlearning: 1)"
"""Source of the range of retain weights."""


def rate(field: str, factor: float = 1.0) -> Knob:
    """A learning rate, over the same range for every method (`factor` for one whose authors use another scale)."""
    prior = LogUniform(3e-6, 1e-4).times(factor)
    return Knob(field, prior, f"half a decade below OpenUnlearning's default of {1e-5 * factor:g} and a decade above")


@dataclass(frozen=True)
class Space:
    """What is tuned of a method."""

    knobs: tuple[Knob, ...]

    def draws(self, count: int, seed: int | Sequence[int], base: UnlearnConfig) -> list[Overrides]:
        """`count` draws, the same for the same seed: a Latin hypercube, so that few draws still cover each range.

        Each field's range is cut into `count` parts of equal probability, each of which is drawn from once, in an
        order of its own. `base`: the configuration that the draws will be applied to, for `Knob.given`.
        """
        rng = np.random.default_rng(seed)
        columns = [(rng.permutation(count) + rng.random(count)) / count for _ in self.knobs]
        return [self.at([float(column[index]) for column in columns], base) for index in range(count)]

    def at(self, quantiles: Sequence[float], base: UnlearnConfig) -> Overrides:
        """The values at one quantile per knob, in their order; `base` as in `draws`."""
        drawn = {knob.field: knob.prior.at(quantile) for knob, quantile in zip(self.knobs, quantiles, strict=True)}
        return self.with_meaning(drawn, base)

    def with_meaning(self, drawn: Overrides, base: UnlearnConfig) -> Overrides:
        """Without the fields whose `given` is 0 or null in what was drawn (in `base`, where it was not drawn)."""
        from ofmu_ray.config.overrides import value_at

        given = {knob.field: knob.given for knob in self.knobs}

        def holds(field: str | None) -> bool:
            return field is None or bool(drawn.get(field, value_at(base, field)))

        return {field: value for field, value in drawn.items() if holds(given.get(field))}

    def scaled(self, factor: float) -> Space:
        """Learning rates times `factor`: the spaces' ranges are for models of 1 B parameters and more."""
        return Space(
            tuple(
                dataclasses.replace(knob, prior=knob.prior.times(factor))
                if knob.field.endswith(".lr") and isinstance(knob.prior, LogUniform)
                else knob
                for knob in self.knobs
            )
        )

    def with_priors(self, priors: Mapping[str, Prior | None], why: str = "the user's") -> Space:
        """Other priors for these fields, more fields, or fewer (null); `why` is their source."""
        known = {knob.field for knob in self.knobs}
        kept = [
            dataclasses.replace(knob, prior=prior, why=why) if (prior := priors.get(knob.field)) else knob
            for knob in self.knobs
            if priors.get(knob.field, knob.prior) is not None
        ]
        new = [Knob(field, prior, why) for field, prior in priors.items() if prior and field not in known]
        return Space((*kept, *new))

    def around(self, options: Overrides, why: str) -> Space:
        """The middle quarter of each field's range around its value in `options` (of the logarithm's range, where the
        prior is one of it), cut off where the prior ends; choices stay, and so do fields that were not drawn."""
        priors: dict[str, Prior | None] = {
            knob.field: _around(knob.prior, options[knob.field]) if knob.field in options else None
            for knob in self.knobs
        }
        return self.with_priors(priors, why)

    def check(self, base: UnlearnConfig) -> None:
        """Every field exists and takes its prior's values. Raises UserError, with the closest field otherwise."""
        from ofmu_ray.config.overrides import apply_overrides, value_at

        for knob in self.knobs:
            for quantile in (0.0, 0.5, 1.0 - 1e-9):
                apply_overrides(base, {knob.field: knob.prior.at(quantile)})
            if knob.given is not None:
                value_at(base, knob.given)
