"""Requests as values, and as rows of the ledger's table."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from ofmu_ray.errors import UserError
from ofmu_ray.requests.schema import RequestRecord
from ofmu_ray.requests.states import State


class UnknownRequest(UserError):
    """No request has this id."""


@dataclass(frozen=True)
class Request:
    """A request as it was when it was read. Times are UTC."""

    id: str
    key: str
    state: State
    created: datetime
    deadline: datetime
    row_count: int
    data: str
    """Fingerprint of the training data that its rows were found in."""
    by: str
    accepted: datetime | None
    ended: datetime | None
    batch: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values; none of them is a text of the request. `rows`: how many it names."""
        return {
            name: value.isoformat(timespec="seconds") if isinstance(value, datetime) else value
            for name, value in vars(self).items()
        } | {"rows": self.row_count}


def new_id() -> str:
    """A random id."""
    return f"req-{uuid.uuid4().hex[:20]}"


def record_of(session: Session, request_id: str) -> RequestRecord:
    record = None if "\x00" in request_id else session.get(RequestRecord, request_id)  # PostgreSQL's text has no NUL
    if record is None:
        raise UnknownRequest(f"request {request_id[:60]!r}: there is none with this id; see `ofmu requests list`")
    return record


def as_request(record: RequestRecord) -> Request:
    return Request(**{name: getattr(record, name) for name in Request.__dataclass_fields__})


def identity(record: RequestRecord) -> dict[str, Any]:
    """What of a request never changes: it stands in its first event."""
    return {
        "key": record.key,
        "content_hash": record.content_hash,
        "deadline": record.deadline.isoformat(),
        "row_count": record.row_count,
        "rows_digest": record.rows_digest,
        "data": record.data,
    }
