"""The methods' sections of options, discovered together with the methods."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from ofmu_ray.config.methods import MethodConfig

if TYPE_CHECKING:
    MethodName = str

# The one import that points up (tests/test_layers.py): methods depend on the rest of the configuration, and their
# sections of options stand with them. By name, so that it runs when the rest is there (ofmu_ray/methods/__init__.py).
_REGISTRY = importlib.import_module("ofmu_ray.methods.registry")
_CLASSES: dict[str, type[Any]] = {name: kind for name, kind in _REGISTRY.discovered().items() if kind.unlearns}

METHODS: dict[str, type[MethodConfig]] = {name: kind.options for name, kind in _CLASSES.items()}
"""Method -> its options, in the section of the same name."""
if not TYPE_CHECKING:
    MethodName = Literal[tuple(METHODS)]
SPACES: dict[str, dict[str, tuple[str, str]]] = {name: kind.space for name, kind in _CLASSES.items()}
"""Method -> its search space: option -> (prior, source of the range)."""
PRESETS: dict[str, dict[str, dict[str, Any]]] = {name: kind.presets for name, kind in _CLASSES.items() if kind.presets}
"""Method -> value of its option `preset` -> the options that it sets."""
LABELS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    **{
        f"{name}_{preset}": {"method": name, f"{name}.preset": preset}
        for name, presets in PRESETS.items()
        for preset in presets
        if preset != METHODS[name].default().preset  # type: ignore[attr-defined]
    },
}
"""Label -> overrides of the base configuration: the methods, and their presets other than the default."""
