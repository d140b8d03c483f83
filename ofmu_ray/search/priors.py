"""Priors of single fields: Optuna's distributions, their text form, and the value at a quantile.

Optuna has no distribution for an optional term, so `ZeroOrLogUniform` is our own.
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
"""Share of a range on either side of a value that counts as near it."""
WIDER = 1.5
"""Factor by which a narrowed prior extends beyond the values that it is made from."""


@dataclass(frozen=True)
class ZeroOrLogUniform:
    """0 with probability `zero`, else log-uniform from `low` to `high`: for an optional term."""

    low: float
    high: float
    zero: float = 0.25

    def __post_init__(self) -> None:
        _require(0 < self.low <= self.high and 0 < self.zero < 1, text_of(self), "0 < low <= high and 0 < zero < 1")

    @property
    def positive(self) -> FloatDistribution:
        """The distribution of non-zero values."""
        return LogUniform(self.low, self.high)


Prior = FloatDistribution | IntDistribution | CategoricalDistribution | ZeroOrLogUniform


def LogUniform(low: float, high: float) -> FloatDistribution:
    """Log-uniform from `low` to `high`."""
    _require(0 < low <= high, f"loguniform({low:g}, {high:g})", "0 < low <= high")
    return FloatDistribution(low, high, log=True)


def Uniform(low: float, high: float) -> FloatDistribution:
    """Uniform from `low` to `high`."""
    _require(low <= high, f"uniform({low:g}, {high:g})", "low <= high")
    return FloatDistribution(low, high)


def Integers(low: int, high: int) -> IntDistribution:
    """Integers from `low` to `high`, both included, equally likely."""
    integers = isinstance(low, int) and isinstance(high, int)
    _require(integers and low <= high, f"integer({low}, {high})", "integers with low <= high")
    return IntDistribution(low, high)


def Choice(options: Sequence[Any]) -> CategoricalDistribution:
    """One of the options, equally likely."""
    _require(bool(options), "choice()", "at least one option")
    return CategoricalDistribution(options)


def _require(condition: bool, prior: str, need: str) -> None:
    if not condition:
        raise UserError(f"prior {prior}: must have {need}")


def at(prior: Prior, quantile: float) -> Any:
    """The value at a quantile in [0, 1); numbers have four digits, easy to read and to type."""
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
    """Round a number to four digits; return anything else unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def text_of(prior: Prior) -> str:
    """The prior as text that `parse_prior` reads."""
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
    """Both ends times a factor, if the prior is log-uniform."""
    logarithmic = isinstance(prior, FloatDistribution) and prior.log
    return LogUniform(prior.low * factor, prior.high * factor) if logarithmic else prior  # type: ignore[union-attr]


def around(prior: Prior, value: Any) -> Prior:
    """A quarter of the prior's range around a value, clipped to the prior; for a choice, the value itself."""
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
    """The part of the prior that these values span, plus a margin."""
    match prior:
        case CategoricalDistribution(choices=options):
            return Choice(tuple(option for option in options if option in drawn))
        case ZeroOrLogUniform():
            nonzero = [value for value in drawn if value]
            if not nonzero:
                return Choice((0.0,))
            positive = narrowed(prior.positive, nonzero)
            assert isinstance(positive, FloatDistribution)
            return positive if len(nonzero) == len(drawn) else replace(prior, low=positive.low, high=positive.high)
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
    """Parse a prior's text form.

    Forms: `loguniform(1e-5, 1e-3)`, `uniform(0, 1)`, `integer(2, 8)`, `zero_or_loguniform(1e-5, 1e-2)` (0 in a quarter
    of the draws, or in the share given as third argument) and `choice(a, 2, null)` (options as YAML reads them).

    Raises:
        UserError: the text has another form.
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
    """Parse priors by dotted field; null: the field is not tuned.

    Raises:
        UserError: not a prior; the message names `option` and the field.
    """
    priors: dict[str, Prior | None] = {}
    for field, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UserError(f"{option}: {field} = {text!r} is not a prior; write loguniform(LOW, HIGH) and the like")
        try:
            priors[field] = None if text is None else parse_prior(text)
        except UserError as error:
            raise UserError(f"{option}: {field}: {error}") from None
    return priors


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
