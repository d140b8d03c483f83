"""Priors of single fields: Optuna's distributions, their texts, and the value at a quantile.

Optuna has no word for a term that may be left out: `ZeroOrLogUniform` is the only prior of our own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from ofmu_ray.config import close_match
from ofmu_ray.errors import UserError

NEAR = 1 / 8
"""Share of a range to either side of a value that counts as near it."""
WIDER = 1.5
"""Factor by which a narrowed prior reaches beyond the values that it is made from."""


@dataclass(frozen=True)
class ZeroOrLogUniform:
    """0 with probability `zero`, else uniform in the logarithm from `low` to `high`: a term that may be left out."""

    low: float
    high: float
    zero: float = 0.25

    def __post_init__(self) -> None:
        _require(0 < self.low <= self.high and 0 < self.zero < 1, text_of(self), "0 < low <= high and 0 < zero < 1")

    @property
    def positive(self) -> FloatDistribution:
        """The distribution of values that are not 0."""
        return LogUniform(self.low, self.high)


Prior = FloatDistribution | IntDistribution | CategoricalDistribution | ZeroOrLogUniform


def LogUniform(low: float, high: float) -> FloatDistribution:
    """Uniform in the logarithm, from `low` to `high`."""
    _require(0 < low <= high, f"loguniform({low:g}, {high:g})", "0 < low <= high")
    return FloatDistribution(low, high, log=True)


def Uniform(low: float, high: float) -> FloatDistribution:
    """Uniform from `low` to `high`."""
    _require(low <= high, f"uniform({low:g}, {high:g})", "low <= high")
    return FloatDistribution(low, high)


def Integers(low: int, high: int) -> IntDistribution:
    """Whole numbers from `low` to `high`, both included, equally likely."""
    whole = isinstance(low, int) and isinstance(high, int)
    _require(whole and low <= high, f"integer({low}, {high})", "whole numbers with low <= high")
    return IntDistribution(low, high)


def Choice(options: Sequence[Any]) -> CategoricalDistribution:
    """One of the options, equally likely."""
    _require(bool(options), "choice()", "at least one option")
    return CategoricalDistribution(options)


def _require(condition: bool, prior: str, need: str) -> None:
    if not condition:
        raise UserError(f"prior {prior}: must have {need}")


def at(prior: Prior, quantile: float) -> Any:
    """The value at a quantile in [0, 1); numbers with four digits, which a person can read and give again."""
    match prior:
        case ZeroOrLogUniform(zero=zero):
            return 0.0 if quantile < zero else at(prior.positive, (quantile - zero) / (1 - zero))
        case CategoricalDistribution(choices=options):
            return options[math.floor(quantile * len(options))]
        case IntDistribution(low=low, high=high):
            return low + math.floor(quantile * (high - low + 1))
        case FloatDistribution(low=low, high=high, log=log):
            value = low * (high / low) ** quantile if log else low + (high - low) * quantile
            return readable(value)


def readable(value: Any) -> Any:
    """A number with four digits; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def text_of(prior: Prior) -> str:
    """What `parse_prior` reads."""
    match prior:
        case ZeroOrLogUniform(low=low, high=high, zero=zero):
            share = "" if zero == ZeroOrLogUniform.zero else f", {zero:g}"
            return f"zero_or_loguniform({low:g}, {high:g}{share})"
        case CategoricalDistribution(choices=options):
            return f"choice({', '.join('null' if option is None else str(option) for option in options)})"
        case IntDistribution(low=low, high=high):
            return f"integer({low}, {high})"
        case FloatDistribution(low=low, high=high, log=log):
            return f"{'log' if log else ''}uniform({low:g}, {high:g})"


def scaled(prior: Prior, factor: float) -> Prior:
    """Both ends times a factor, where the prior is uniform in the logarithm."""
    logarithmic = isinstance(prior, FloatDistribution) and prior.log
    return LogUniform(prior.low * factor, prior.high * factor) if logarithmic else prior  # type: ignore[union-attr]


def around(prior: Prior, value: Any) -> Prior:
    """A quarter of the prior's range, around a value, cut off where the prior ends; of a choice, the value itself."""
    if isinstance(prior, ZeroOrLogUniform) and value:
        prior = prior.positive
    match prior:
        case IntDistribution(low=low, high=high):
            steps = max(1, round(NEAR * (high - low)))
            return Integers(max(low, value - steps), min(high, value + steps))
        case FloatDistribution(low=low, high=high, log=True):
            factor = (high / low) ** NEAR
            return LogUniform(max(low, value / factor), min(high, value * factor))
        case FloatDistribution(low=low, high=high):
            reach = NEAR * (high - low)
            return Uniform(max(low, value - reach), min(high, value + reach))
    return Choice((value,))


def narrowed(prior: Prior, drawn: Sequence[Any]) -> Prior:
    """The part of the prior that these values span, and a little beyond."""
    match prior:
        case CategoricalDistribution(choices=options):
            return Choice(tuple(option for option in options if option in drawn))
        case ZeroOrLogUniform():
            there = [value for value in drawn if value]
            if not there:
                return Choice((0.0,))
            positive = narrowed(prior.positive, there)
            assert isinstance(positive, FloatDistribution)
            return positive if len(there) == len(drawn) else replace(prior, low=positive.low, high=positive.high)
        case IntDistribution(low=low, high=high):
            return Integers(max(low, min(drawn) - 1), min(high, max(drawn) + 1))
        case FloatDistribution(low=low, high=high, log=True):
            low, high = max(low, min(drawn) / WIDER), min(high, max(drawn) * WIDER)
            return LogUniform(float(f"{low:.3g}"), float(f"{max(low, high):.3g}"))
        case FloatDistribution(low=low, high=high):
            margin = (WIDER - 1) / 2 * (max(drawn) - min(drawn))
            return Uniform(max(low, min(drawn) - margin), min(high, max(drawn) + margin))


_KINDS: dict[str, Callable[..., Prior]] = {
    "loguniform": LogUniform,
    "uniform": Uniform,
    "integer": Integers,
    "zero_or_loguniform": ZeroOrLogUniform,
    "choice": lambda *options: Choice(options),
}


def parse_prior(text: str) -> Prior:
    """`loguniform(1e-5, 1e-3)`, `uniform(0, 1)`, `integer(2, 8)`, `zero_or_loguniform(1e-5, 1e-2)` (0 in a quarter of
    the draws, or in the share that stands third) or `choice(a, 2, null)` (as YAML reads the options).

    Raises:
        UserError: anything else.
    """
    import yaml

    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if match is None or match[1] not in _KINDS:
        hint = close_match(match[1], _KINDS) if match else ""
        raise UserError(
            f"prior {text!r}:{hint} write loguniform(LOW, HIGH), uniform(LOW, HIGH), integer(LOW, HIGH), "
            "zero_or_loguniform(LOW, HIGH) or choice(A, B, ...)"
        )
    # YAML 1.1 reads 1e-5 as text
    options = tuple(_number(value) for value in yaml.safe_load(f"[{match[2]}]"))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in options)
    counts = (2, 3) if match[1] == "zero_or_loguniform" else (2,)
    if match[1] != "choice" and (len(options) not in counts or not numbers):
        raise UserError(f"prior {text!r}: {match[1]} takes two numbers, the lowest and the highest")
    return _KINDS[match[1]](*options)


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
