"""Override fields of a configuration by name, as benchmarks and sweeps do."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ofmu_ray.config.method_sections import PRESETS
from ofmu_ray.config.values import close_match, flatten, to_dict
from ofmu_ray.errors import UserError

Config = TypeVar("Config")


def apply_overrides(config: Config, overrides: Mapping[str, Any], *, option: str = "") -> Config:
    """The configuration with fields replaced, by dotted or nested names; types and ranges are checked.

    A preset (`ofmu.preset`) is applied before the fields that it sets, whatever their order. `option` is a prefix for
    names in errors.

    Raises:
        UserError: no such field (with the closest match), or a value with the wrong type or out of range.
    """
    changes = nested(overrides)
    for method, presets in PRESETS.items():
        section = changes.get(method)
        preset = section.get("preset") if isinstance(section, Mapping) else None
        if preset in presets:
            config = typing.cast(Config, _replaced(config, {method: presets[preset]}, "", option))
    return typing.cast(Config, _replaced(config, changes, "", option))


def value_at(config: Any, field: str) -> Any:
    """The value of a dotted field. Raises UserError, with the closest match, if there is no such field."""
    value = config
    for name in field.split("."):
        if not dataclasses.is_dataclass(value) or not hasattr(value, name):
            raise _unknown(config, field, field)
        value = getattr(value, name)
    return value


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """{'a.b': 1, 'a': {'c': 2}} -> {'a': {'b': 1, 'c': 2}}."""
    result: dict[str, Any] = {}
    for name, value in overrides.items():
        head, _, tail = str(name).partition(".")
        content = nested({tail: value}) if tail else nested(value) if isinstance(value, Mapping) else value
        result[head] = merged(result.get(head), content)
    return result


def merged(first: Any, second: Any) -> Any:
    """`second` over `first`, mapping by mapping."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return second
    return {**first, **{name: merged(first.get(name), value) for name, value in second.items()}}


def _replaced(config: Any, changes: Mapping[str, Any], prefix: str, option: str) -> Any:
    kind: Any = type(config)
    hints = _hints(kind)
    values = {}
    for name, value in changes.items():
        if name not in hints or isinstance(getattr(kind, name, None), property):
            raise _unknown(config, name, f"{option}{prefix}{name}")
        current = getattr(config, name)
        section = _section(hints[name])
        if isinstance(value, Mapping) and section is not None:
            start = current if dataclasses.is_dataclass(current) else section()
            values[name] = _replaced(start, value, f"{prefix}{name}.", option)
        else:
            values[name] = _typed(value, hints[name], f"{option}{prefix}{name}")
    return dataclasses.replace(config, **values)


@functools.cache  # a benchmark replaces fields hundreds of times before it starts
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _section(hint: Any) -> Any:
    """The dataclass in a field's type (X or X | None); None if there is none."""
    return next((kind for kind in _kinds(hint) if dataclasses.is_dataclass(kind)), None)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union; for any other type, the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """The value in the field's type: 1 is accepted for 1.0, anything else is refused."""
    for kind in _kinds(hint):
        origin = typing.get_origin(kind)
        if origin is Literal and value in typing.get_args(kind):
            return value
        if origin is list and isinstance(value, list):
            return [_item(item, typing.get_args(kind)[0], name) for item in value]
        if origin is dict and isinstance(value, dict):
            return value
        if origin is None and isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
            return value
    numbers = {kind for kind in _kinds(hint) if kind in (int, float)}
    if isinstance(value, int | float) and not isinstance(value, bool):
        if float in numbers:
            return float(value)
        if int in numbers and float(value).is_integer():
            return int(value)
    raise UserError(f"{name} = {value!r}: must be {_shown(hint)}")


def _item(value: Any, kind: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        known = [field.name for field in dataclasses.fields(kind)]
        for word in value:
            if word not in known:
                raise UserError(f"unknown option {name}.{word}.{close_match(word, known)}")
        return kind(**value)  # type: ignore[operator]
    return _typed(value, kind, name)


def _shown(hint: Any) -> str:
    names = []
    for kind in _kinds(hint):
        literal = typing.get_origin(kind) is Literal
        name = ", ".join(map(str, typing.get_args(kind))) if literal else getattr(kind, "__name__", str(kind))
        names.append("null" if kind is type(None) else name)
    return " or ".join(names)


def _unknown(config: Any, word: str, name: str) -> UserError:
    known = flatten(to_dict(config)) if "." in word else [field.name for field in dataclasses.fields(config)]
    return UserError(f"unknown option {name}.{close_match(word, known)} `ofmu unlearn --print_config` shows all")
