"""How things stand: requests by state, deadlines at risk, last promotions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ofmu_ray.requests.records import Request
from ofmu_ray.requests.states import OPEN, STATES

AT_RISK = 0.25
"""An open request is at risk when less than this share of its time is left."""
LAST = 10


@dataclass(frozen=True)
class Standing:
    """A summary of the ledger, without text."""

    counts: dict[str, int]
    """Requests by state, of the states that occur."""
    at_risk: list[Request]
    """Open requests whose deadline is near or past, the most urgent first."""
    promoted: list[Request]
    """The last promotions, newest first."""

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "at_risk": [one.to_json() for one in self.at_risk],
            "promoted": [one.to_json() for one in self.promoted],
        }


def standing(requests: Sequence[Request], now: datetime) -> Standing:
    counts = {state: sum(one.state == state for one in requests) for state in STATES}
    at_risk = [
        one for one in requests if one.state in OPEN and now >= one.deadline - AT_RISK * (one.deadline - one.created)
    ]
    promoted = [one for one in requests if one.state == "promoted"]
    return Standing(
        {state: count for state, count in counts.items() if count},
        sorted(at_risk, key=lambda one: one.deadline),
        sorted(promoted, key=lambda one: one.ended or one.created, reverse=True)[:LAST],
    )


def deadline_line(request: Request, now: datetime) -> str:
    """'due in 3.2 days' or '1.0 days late'."""
    days = (request.deadline - now).total_seconds() / 86400
    return f"due in {days:.1f} days" if days >= 0 else f"{-days:.1f} days late"
