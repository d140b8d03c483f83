"""How things stand: requests by state, deadlines at risk, last promotions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from ofmu_ray.requests.database import reading
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.records import Request, as_request
from ofmu_ray.requests.schema import RequestRecord
from ofmu_ray.requests.states import OPEN, STATES

AT_RISK = 0.25
"""An open request is at risk when less than this share of its time is left."""
LAST = 10
"""Promotions shown."""


@dataclass(frozen=True)
class Standing:
    """A summary of the ledger, without text."""

    now: datetime
    counts: dict[str, int]
    """Requests by state, of the states that occur."""
    open: list[Request]
    """Requests that are not answered, the most urgent first."""
    promoted: list[Request]
    """The last promotions, newest first."""

    @property
    def at_risk(self) -> list[Request]:
        """Open requests whose deadline is near or past."""
        return [one for one in self.open if one.deadline - self.now <= AT_RISK * (one.deadline - one.created)]

    def left(self, request: Request) -> str:
        """'due in 3.2 days' or '1.0 days late'."""
        days = (request.deadline - self.now).total_seconds() / 86400
        return f"due in {days:.1f} days" if days >= 0 else f"{-days:.1f} days late"

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "at_risk": [one.to_json() for one in self.at_risk],
            "promoted": [one.to_json() for one in self.promoted],
        }


def standing(ledger: Ledger) -> Standing:
    counting = select(RequestRecord.state, func.count()).group_by(RequestRecord.state)
    open_ = select(RequestRecord).where(RequestRecord.state.in_(OPEN)).order_by(RequestRecord.deadline)
    last = select(RequestRecord).where(RequestRecord.state == "promoted").order_by(RequestRecord.ended.desc())
    with reading(ledger.engine) as session:
        counts = {row[0]: row[1] for row in session.execute(counting)}
        return Standing(
            ledger.clock(),
            {state: counts[state] for state in STATES if state in counts},
            [as_request(record) for record in session.scalars(open_)],
            [as_request(record) for record in session.scalars(last.limit(LAST))],
        )
