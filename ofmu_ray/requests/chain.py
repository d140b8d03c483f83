"""The log: entries chained by SHA-256, and the audit of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from ofmu_ray.requests.schema import EventRecord, PayloadRecord, RequestRecord, RowRecord
from ofmu_ray.requests.states import ENDED, NEXT, STATES
from ofmu_ray.requests.vault import canonical

FIRST = "0" * 64
"""`prev` of the first entry."""


@dataclass(frozen=True)
class Event:
    """An entry of the log."""

    seq: int
    at: str
    """UTC, ISO 8601."""
    request: str | None
    event: str
    """The state that the request came into, or what else happened (key_destroyed, token_created ...)."""
    old: str | None
    """The state before."""
    by: str
    detail: dict[str, Any]
    prev: str
    hash: str


def append(
    session: Session,
    now: datetime,
    request: str | None,
    event: str,
    *,
    old: str | None = None,
    by: str = "",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Add an entry in the caller's transaction, which no other writer overlaps."""
    last = session.execute(select(EventRecord.seq, EventRecord.hash).order_by(EventRecord.seq.desc()).limit(1)).first()
    seq, prev = (1, FIRST) if last is None else (last.seq + 1, last.hash)
    body = canonical(
        {
            "seq": seq,
            "at": _written(now),
            "request": request,
            "event": event,
            "old": old,
            "by": by,
            "detail": dict(detail or {}),
            "prev": prev,
        }
    )
    session.execute(insert(EventRecord), {"seq": seq, "request_id": request, "body": body, "hash": _hash(body)})


def _written(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def _hash(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _read(text: str) -> dict[str, Any]:
    """An entry's content; empty if `append` did not write it, as then anything may stand there."""
    try:
        body = json.loads(text)
        Event(**body, hash="")
    except (ValueError, TypeError, RecursionError):
        return {}
    plain = isinstance(body["detail"], dict) and all(
        isinstance(body[name], str | None) for name in ("request", "event", "old")
    )
    return body if plain else {}


def check_chain(
    session: Session, known: Sequence[str], identity: Callable[[RequestRecord], dict[str, Any]]
) -> list[str]:
    """Problems, one a line: of the chain, then of each request against its entries."""
    problems: list[str] = []
    prev, hashes = FIRST, set()
    first: dict[str, dict[str, Any]] = {}
    state: dict[str, str] = {}
    times: dict[str, dict[str, str | None]] = {}
    destroyed: set[str] = set()
    expected = 1
    for record in session.scalars(select(EventRecord).order_by(EventRecord.seq)):
        place, body = f"event {record.seq}", _read(record.body)
        if _hash(record.body) != record.hash:
            problems.append(f"{place}: its content was changed (the hash differs)")
        if body.get("seq") != record.seq or body.get("request") != record.request_id or record.seq != expected:
            problems.append(f"{place}: entries are missing or in another order (expected number {expected})")
        if body.get("prev") != prev:
            problems.append(f"{place}: does not follow the entry before (the chain is broken)")
        prev, expected = record.hash, record.seq + 1
        hashes.add(record.hash)
        name, kind = body.get("request"), body.get("event")
        if name is None:
            continue
        if kind == "received":
            first[name] = body["detail"]
        elif kind in STATES and (body["old"] != state.get(name) or kind not in NEXT.get(body["old"], ())):
            problems.append(f"{place}: {name} cannot go from {state.get(name)} to {kind}")
        if kind in STATES:
            state[name] = kind
            its = times.setdefault(name, {"created": None, "accepted": None, "ended": None})
            its["ended"] = body["at"] if kind in ENDED else None
            if kind in ("received", "accepted"):
                field = "created" if kind == "received" else kind
                its[field] = its[field] or body["at"]
        if kind == "key_destroyed":
            destroyed.add(name)
    problems += [f"the entry with hash {one} is gone" for one in known if one not in hashes]
    return problems + _check_requests(session, first, state, times, destroyed, identity)


def _check_requests(
    session: Session,
    first: dict[str, dict[str, Any]],
    state: dict[str, str],
    times: dict[str, dict[str, str | None]],
    destroyed: set[str],
    identity: Callable[[RequestRecord], dict[str, Any]],
) -> list[str]:
    problems = []
    missing = set(first)
    readable = set(session.scalars(select(PayloadRecord.request_id).where(PayloadRecord.wrapped_key.is_not(None))))
    rows: dict[str, list[str]] = {}
    for name, value in session.execute(
        select(RowRecord.request_id, RowRecord.hash).order_by(RowRecord.request_id, RowRecord.number)
    ):
        rows.setdefault(name, []).append(value)
    for record in session.scalars(select(RequestRecord).order_by(RequestRecord.created)):
        missing.discard(record.id)
        if record.id not in first:
            problems.append(f"{record.id}: no entry says that it was received")
            continue
        if record.state != state.get(record.id):
            problems.append(f"{record.id}: is {record.state}, but its last entry says {state.get(record.id)}")
        for field, at in times.get(record.id, {}).items():
            moment: datetime | None = getattr(record, field)
            if (None if moment is None else _written(moment)) != at:
                problems.append(f"{record.id}: the time in {field} is not that of its entry")
        for field, value in identity(record).items():
            if first[record.id].get(field) != value:
                problems.append(f"{record.id}: its {field} was changed after it was received")
        if hashlib.sha256("".join(rows.get(record.id, [])).encode()).hexdigest() != record.rows_digest:
            problems.append(f"{record.id}: the hashes of its rows were changed")
        if (record.id in readable) == (record.id in destroyed):
            what = "was destroyed, but is there" if record.id in readable else "is gone, but no entry says why"
            problems.append(f"{record.id}: the key of its rows {what}")
    return problems + [f"{name}: was received, and is gone" for name in sorted(missing)]
