"""Range checks with errors that name the option."""

from __future__ import annotations

import math

from ofmu_ray.errors import UserError


def require(condition: bool, option: str, value: object, need: str) -> None:
    if not condition:
        raise UserError(f"{option} = {value!r}: must be {need}")


def positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            ok = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
            require(ok, f"{section}.{name}", value, "greater than 0")


def not_negative(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            ok = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            require(ok, f"{section}.{name}", value, "0 or more")
