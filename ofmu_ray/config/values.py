"""Configurations as plain values: dicts, flat names, hashes."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts (JSON and YAML can hold it), without the sections it does not use."""
    unused: frozenset[str] = getattr(config, "unused_sections", frozenset())
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in unused}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}: the names that the command line and MLflow use."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def config_hash(config: Any, *extra: str, ignore: Iterable[str] = ("name", "storage", "tracking", "report")) -> str:
    """Hex digest (16 digits) of what determines a run: the config without where it is stored, plus `extra`."""
    content = {key: value for key, value in to_dict(config).items() if key not in set(ignore)}
    text = json.dumps([content, *extra], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def close_match(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a misspelt option, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""
