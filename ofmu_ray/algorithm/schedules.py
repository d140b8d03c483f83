"""Learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

FLOOR = 0.1

Decay = Literal["constant", "linear", "cosine", "step"]


class Schedule(Protocol):
    """A learning rate and its schedule; ofmu_ray.config.OptimizerConfig declares and explains them."""

    @property
    def rate(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def decay(self) -> Decay: ...
    @property
    def milestones(self) -> Sequence[float]: ...
    @property
    def step_factor(self) -> float: ...


def learning_rate(schedule: Schedule, done: int, rounds: int | None) -> float:
    """Learning rate of the round after `done` of `rounds` rounds (None: unknown, so no schedule)."""
    if rounds is None:
        return schedule.rate
    if schedule.decay == "step":
        warm = warmup_then("constant", done, rounds, math.ceil(schedule.warmup_fraction * rounds))
        passed = sum(done >= round(milestone * rounds) for milestone in schedule.milestones)
        return schedule.rate * warm * schedule.step_factor**passed
    return schedule.rate * warmup_then(schedule.decay, done, rounds, math.ceil(schedule.warmup_fraction * rounds))


def warmup_then(decay: Decay, step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate at `step` (0-based) of `steps`.

    Rises linearly over the first `warmup` steps, then stays constant or decays to `FLOOR` at the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    if decay == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    if decay == "linear":
        return 1.0 - (1.0 - FLOOR) * progress
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))
