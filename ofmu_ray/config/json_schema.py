"""A configuration class as a JSON schema, for editors that complete and check YAML."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any


def schema_of(config_class: type[Any]) -> dict[str, Any]:
    """The schema: every option with type, choices and text; nothing else is allowed."""
    from docstring_parser import parse_from_object
    from pydantic import TypeAdapter

    schema = TypeAdapter(config_class).json_schema()
    classes = {kind.__name__: kind for kind in _dataclasses(config_class, {})}
    definitions = schema.get("$defs", {}) | {config_class.__name__: schema}
    for name, definition in definitions.items():
        definition["additionalProperties"] = False
        texts = {
            one.arg_name: " ".join((one.description or "").split())
            for base in classes[name].__mro__[-2::-1]
            for one in parse_from_object(base).params
        }
        for option, entry in definition["properties"].items():
            entry.pop("title", None)
            if texts.get(option):
                entry["description"] = texts[option]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _dataclasses(kind: type[Any], found: dict[type[Any], None]) -> dict[type[Any], None]:
    """A dataclass and those in the types of its fields, at any depth."""
    found[kind] = None
    waiting = list(typing.get_type_hints(kind).values())
    while waiting:
        hint = waiting.pop()
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if hint not in found:
                _dataclasses(hint, found)
        else:
            waiting += typing.get_args(hint)
    return found
