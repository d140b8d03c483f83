"""The sections of the methods: found with them, whose files say what their options are."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from ofmu_ray.config.methods import MethodConfig

if TYPE_CHECKING:
    MethodName = str

# by name, because methods are built on the rest of the configuration; ofmu_ray/methods/__init__.py has the other half
_REGISTRY = importlib.import_module("ofmu_ray.methods.registry")
_CLASSES: dict[str, type[Any]] = {name: kind for name, kind in _REGISTRY.discovered().items() if kind.unlearns}

METHODS: dict[str, type[MethodConfig]] = {name: kind.options for name, kind in _CLASSES.items()}
"""Method -> its options, which stand in the section of the same name."""
if not TYPE_CHECKING:
    MethodName = Literal[tuple(METHODS)]
SPACES: dict[str, dict[str, tuple[str, str]]] = {name: kind.space for name, kind in _CLASSES.items()}
"""Method -> what is tuned of it: option -> (prior, where its range comes from)."""
PRESETS: dict[str, dict[str, dict[str, Any]]] = {name: kind.presets for name, kind in _CLASSES.items() if kind.presets}
"""Method -> values of its option `preset` -> the options that they set."""
LABELS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    **{
        f"{name}_{preset}": {"method": name, f"{name}.preset": preset}
        for name, presets in PRESETS.items()
        for preset in presets
        if preset != METHODS[name].default().preset  # type: ignore[attr-defined]
    },
}
"""Label -> what it changes in the base configuration: the methods, and their presets beside the default."""
