"""Range checks with errors that name the option."""

from __future__ import annotations

import math
import re

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


RESERVED = ("cache", "mlartifacts", "mlflow.db", "requests")
"""What a storage contains besides runs."""
LONGEST_NAME = 128


def run_name(value: str | None) -> None:
    """Refuse a name that is not a folder of its own in the storage; None: derived."""
    if value is None:
        return
    plain = re.fullmatch(r"[\w][^/\\?#%\x00-\x1f\x7f]*", value) and len(value.encode()) <= LONGEST_NAME
    shown = value if len(value) <= 40 else f"{value[:37]}..."
    need = f"a folder's name: at most {LONGEST_NAME} bytes, a letter or digit first, without / \\ ? # %"
    require(bool(plain), "name", shown, need)
    require(not value.startswith(RESERVED[2]) and value not in RESERVED, "name", value, "another: the storage uses it")


def seed(option: str, value: int) -> None:
    """Refuse what numpy and torch do not take."""
    require(0 <= value < 2**63, option, value, "from 0 to 2^63 - 1")
