"""Unlearning methods on top of the engines, each in its own file or folder.

The configuration has a section for each and is imported first: it imports all of them (ofmu_ray.methods.registry).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ofmu_ray.config  # noqa: F401
from ofmu_ray.methods.registry import build_method

if TYPE_CHECKING:
    from ofmu_ray.methods.ofmu import OFMU

__all__ = ["OFMU", "build_method"]


def __getattr__(name: str) -> Any:
    if name != "OFMU":  # on first use: the configuration imports this package while it is itself imported
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ofmu_ray.methods.ofmu import OFMU

    return OFMU
