"""Unlearning methods. A method is a folder here, found by its name:

    NAME/__init__.py   OPTIONS (a dataclass), SPACE (what is tuned), perhaps PRESETS; imports no torch
    NAME/method.py     METHOD, the class that runs rounds over an engine's verbs

Option sections, `--method`, labels, search spaces and planning follow from that.
"""

from __future__ import annotations

import functools
import importlib
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofmu_ray.config.method_options import MethodConfig
    from ofmu_ray.config.spaces import Space
    from ofmu_ray.methods.protocol import Method


@functools.cache
def method_names() -> tuple[str, ...]:
    """All methods, OFMU first; a folder without a SPACE (finetune) is none."""
    folders = sorted(module.name for module in iter_modules(__path__) if module.ispkg)
    return tuple(sorted((name for name in folders if hasattr(_folder(name), "SPACE")), key=lambda name: name != "ofmu"))


def _folder(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def options_of(name: str) -> type[Any]:
    """The dataclass of a method's options."""
    options: type[Any] = _folder(name).OPTIONS
    return options


def space_of(name: str) -> Space:
    """What is tuned of a method."""
    space: Space = _folder(name).SPACE
    return space


def presets_of(name: str) -> dict[str, dict[str, Any]]:
    """Named sets of a method's options, chosen by its option `preset`; most have none."""
    presets: dict[str, dict[str, Any]] = getattr(_folder(name), "PRESETS", {})
    return presets


def build_method(config: MethodConfig, rounds: int | None = None) -> Method:
    """The method whose options these are; `rounds` of the whole run, for the schedules of learning rates."""
    method: Method = importlib.import_module(f"{type(config).__module__}.method").METHOD(config, rounds)
    return method
