"""States of a request, and which may follow which."""

from __future__ import annotations

from typing import Literal, get_args

from ofmu_ray.errors import UserError

State = Literal[
    "received", "accepted", "scheduled", "running", "verifying", "promoted",
    "rejected", "needs_review", "failed", "superseded",
]  # fmt: skip
STATES: tuple[State, ...] = get_args(State)

NEXT: dict[State, tuple[State, ...]] = {
    "received": ("accepted", "rejected"),
    "accepted": ("scheduled", "rejected", "superseded"),
    # back to accepted: the batch was given up before it changed anything
    "scheduled": ("running", "accepted", "failed", "rejected", "superseded"),
    "running": ("verifying", "accepted", "failed", "needs_review"),
    # back to running: a gate failed and the ladder has another recipe
    "verifying": ("promoted", "running", "needs_review", "failed"),
    # rollback reopens a request; without its rows somebody has to look at it
    "promoted": ("accepted", "needs_review"),
    "needs_review": ("accepted", "rejected", "superseded"),
    "failed": ("accepted", "rejected", "superseded"),
    "rejected": (),
    "superseded": (),
}
IN_WORK: tuple[State, ...] = ("scheduled", "running", "verifying")
"""A processor has them under its lease."""
WITHDRAWN: tuple[State, ...] = ("rejected", "superseded")
"""Ended without forgetting: nothing follows, and the texts of their rows are destroyed at once."""
ENDED: tuple[State, ...] = ("promoted", *WITHDRAWN)
"""They were answered."""
OPEN: tuple[State, ...] = tuple(state for state in STATES if state not in ENDED)
"""Their deadline counts."""


def check_move(request: str, old: State, new: str) -> State:
    """`new` as a state; UserError if it does not exist or must not follow `old`."""
    if new not in NEXT[old]:
        allowed = ", ".join(NEXT[old]) or "none: this state is final"
        raise UserError(f"request {request} is {old}: it cannot become {new} (possible: {allowed})")
    return new  # type: ignore[return-value]
