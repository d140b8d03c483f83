"""All methods: every module or package of this package that defines a method of the same name."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from ofmu_ray.config.methods import MethodConfig

if TYPE_CHECKING:
    from ofmu_ray.methods.protocol import Method


@functools.cache
def discovered() -> dict[str, type[Any]]:
    """Name -> class of every method (ofmu_ray.methods.protocol.Method), sorted. Does not import torch."""
    package = importlib.import_module("ofmu_ray.methods")
    methods = {}
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        for kind in vars(module).values():
            if isinstance(kind, type) and vars(kind).get("name") == entry.name:
                methods[entry.name] = kind
    return dict(sorted(methods.items()))


def build_method(options: MethodConfig, rounds: int | None = None) -> Method:
    """The method with these options; `rounds`: of the complete run, for the learning rate schedules."""
    [kind] = [kind for kind in discovered().values() if kind.options is type(options)]
    method: Method = kind(options, rounds)
    return method
