"""Which class runs which baseline's options."""

from __future__ import annotations

from typing import Any

from ofmu_ray.config import GradientAscentConfig
from ofmu_ray.methods.gradient_ascent import GradientAscent
from ofmu_ray.methods.one_loop import OneLoop

BASELINES: dict[type, type[OneLoop[Any]]] = {
    GradientAscentConfig: GradientAscent,
}
"""Options -> method."""
