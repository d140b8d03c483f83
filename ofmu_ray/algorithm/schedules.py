"""Courses of a learning rate over a run."""

from __future__ import annotations

import math
from typing import Literal

FLOOR = 0.1


def warmup_then(decay: Literal["constant", "linear", "cosine"], step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate at `step` (0-based) of `steps`.

    Rises linearly over the first `warmup` steps, then stays or falls to `FLOOR` at the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    if decay == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    if decay == "linear":
        return 1.0 - (1.0 - FLOOR) * progress
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))
