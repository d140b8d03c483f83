"""The ledger of requests: their states, and a log of everything that ever changed them.

    ledger = Ledger("sqlite:///runs/requests/ledger.db", Vault(master_key("master.key", None)))
    request = ledger.add("ticket-17", {"where": {"subject_id": "123"}}, rows, deadline=timedelta(days=30), by="ops")
    batch = ledger.take("nightly@host", 300)
    ledger.move([request.id for request in batch], "running", {"run": "nightly-3"}, owner="nightly@host")

Every change is one transaction that also appends to the log. An entry is canonical JSON that holds the hash of the
entry before, so nothing in it can be changed, removed or put in between unnoticed (`audit`). Writers follow one
another, also from several machines: SQLite's write lock, PostgreSQL's advisory lock.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from ofmu_ray.errors import UserError
from ofmu_ray.requests import lease
from ofmu_ray.requests.chain import Event, append, check_chain
from ofmu_ray.requests.database import forget_pages, opened, reading, writing
from ofmu_ray.requests.records import Request, as_request, identity, new_id, record_of
from ofmu_ray.requests.schema import (
    CertificateRecord,
    EventRecord,
    PayloadRecord,
    RequestRecord,
    RowRecord,
    SecretRecord,
)
from ofmu_ray.requests.states import ENDED, IN_WORK, WITHDRAWN, State, check_move
from ofmu_ray.requests.vault import ROW_KEY, RowHashes, Vault, WrongKey


class KeyTaken(UserError):
    """The idempotency key belongs to a request with other content."""


class Ledger:
    """Requests in a database.

    Without a vault it can be read, audited and moved, but nothing can be added and no text be read.

    Raises:
        UserError: the database cannot be opened; the vault's key is not the ledger's.
    """

    def __init__(self, uri: str, vault: Vault | None = None, clock: Callable[[], datetime] | None = None) -> None:
        self._now = clock or (lambda: datetime.now(UTC))
        self.engine = opened(uri)
        self._vault = vault
        self._hashes = RowHashes(self._row_key(vault)) if vault else None

    def clock(self) -> datetime:
        """The time now, in UTC."""
        return self._now().astimezone(UTC)

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _row_key(self, vault: Vault) -> bytes:
        with reading(self.engine) as session:
            found = session.get(SecretRecord, ROW_KEY)
        if found is None:
            with writing(self.engine) as session:
                found = session.get(SecretRecord, ROW_KEY)
                if found is None:
                    found = SecretRecord(name=ROW_KEY, wrapped=vault.new_key(ROW_KEY))
                    session.add(found)
        self._wrapped = found.wrapped
        return vault.unwrapped(ROW_KEY, found.wrapped)

    def _check_master(self, session: Session) -> None:
        """Refuse to wrap another key by a master key that was replaced since this process read it."""
        found = session.get(SecretRecord, ROW_KEY)
        if found is None or found.wrapped != self._wrapped:
            raise WrongKey("requests.ledger: its master key was replaced; start this process again with the new one")

    @property
    def hashes(self) -> RowHashes:
        """The hashes of this ledger, to find requested rows in a data set."""
        assert self._hashes is not None, "this needs a vault"
        return self._hashes

    @property
    def vault(self) -> Vault:
        assert self._vault is not None, "this needs a vault"
        return self._vault

    # -------------------------------------------------------------------------------------------------- requests

    def add(
        self,
        key: str,
        content: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        *,
        deadline: timedelta,
        data: str = "",
        by: str = "",
        detail: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> Request:
        """Record a request and accept it; the same key with the same content gives the request that exists.

        Args:
            key: idempotency key, chosen by who submits.
            content: what was asked, as submitted (JSON values): its keyed hash decides whether it is the same.
            rows: the rows found for it, with the fields `question`, `answer` and what else is to be kept (JSON values).
            detail: counts and names for the log, no text.
            request_id: its id if it is new (`new_id`); so the caller can tell.

        Raises:
            KeyTaken: the key belongs to other content.
            WrongKey: the master key was replaced since the ledger was opened.
        """
        content_hash = self.hashes.content(content)
        row_hashes = list(dict.fromkeys(self.hashes.row(row["question"], row["answer"]) for row in rows))
        with writing(self.engine) as session:
            if (found := self._by_key(session, key, content_hash)) is not None:
                return found
            self._check_master(session)
            now, name = self.clock(), request_id or new_id()
            digest = hashlib.sha256("".join(row_hashes).encode()).hexdigest()
            record = RequestRecord(
                id=name, key=key, content_hash=content_hash, state="received", created=now, deadline=now + deadline,
                row_count=len(row_hashes), rows_digest=digest, data=data, by=by,
            )  # fmt: skip
            session.add(record)
            session.flush()
            numbered = [{"request_id": name, "number": n, "hash": h} for n, h in enumerate(row_hashes)]
            session.execute(insert(RowRecord), numbered)
            wrapped, ciphertext = self.vault.sealed(name, {"content": dict(content), "rows": [dict(r) for r in rows]})
            session.add(PayloadRecord(request_id=name, wrapped_key=wrapped, ciphertext=ciphertext))
            append(session, now, name, "received", by=by, detail={**identity(record), **(detail or {})})
            self._move(session, record, "accepted", {}, by)
            return as_request(record)

    def find(self, key: str, content: Mapping[str, Any]) -> Request | None:
        """The request that `add` with this key would give back, before its rows are looked up; raises as `add`."""
        with reading(self.engine) as session:
            return self._by_key(session, key, self.hashes.content(content))

    def _by_key(self, session: Session, key: str, content_hash: str) -> Request | None:
        found = session.scalar(select(RequestRecord).where(RequestRecord.key == key))
        if found is not None and found.content_hash != content_hash:
            raise KeyTaken(f"key {key}: belongs to {found.id}, which asks for something else; use another key")
        return None if found is None else as_request(found)

    def get(self, request_id: str) -> Request:
        """UnknownRequest if there is none with this id."""
        with reading(self.engine) as session:
            return as_request(record_of(session, request_id))

    def all(self, states: Sequence[State] | None = None) -> list[Request]:
        """Requests in these states (null: any), oldest first."""
        query = select(RequestRecord).order_by(RequestRecord.created, RequestRecord.id)
        if states is not None:
            query = query.where(RequestRecord.state.in_(states))
        with reading(self.engine) as session:
            return [as_request(record) for record in session.scalars(query)]

    def move(
        self,
        requests: str | Sequence[str],
        state: State,
        detail: Mapping[str, Any] | None = None,
        *,
        owner: str | None = None,
        by: str = "",
        certificate: str | None = None,
    ) -> list[Request]:
        """Bring requests into a state, all or none, in one transaction.

        `owner`: whoever has the lease; without it a request in work cannot be moved while somebody's lease holds.
        `by`: whom the log names, if not the owner. `detail` goes into the log: names, counts, metrics, no text.
        `certificate`: a signed document that becomes theirs in the same transaction.

        Raises:
            UserError: no such request (UnknownRequest), the state must not follow.
            LeaseHeld: `owner` does not have the lease (any more), or somebody else has it.
        """
        with writing(self.engine) as session:
            records = [record_of(session, name) for name in ([requests] if isinstance(requests, str) else requests)]
            if owner is not None or any(record.state in IN_WORK for record in records):
                lease.fence(session, owner, self.clock())
            for record in records:
                self._move(session, record, state, detail or {}, by or owner or "")
                if certificate is not None:
                    session.merge(CertificateRecord(request_id=record.id, document=certificate, created=self.clock()))
            moved = [as_request(record) for record in records]
        if state in WITHDRAWN:
            forget_pages(self.engine)
        return moved

    def retry(self, requests: Sequence[str], by: str) -> list[Request]:
        """Accept requests again; UserError unless all of them failed or need a review, and can be read."""
        for one in map(self.get, requests):
            if one.state not in ("needs_review", "failed"):
                raise UserError(
                    f"request {one.id} is {one.state}: only what is needs_review or failed is accepted again"
                )
            if not self.readable(one.id):
                raise UserError(
                    f"request {one.id}: the key of its rows is destroyed, so they cannot be forgotten again: "
                    "cancel it (`ofmu requests cancel`), and add a new request if the rows are known"
                )
        return self.move(requests, "accepted", {"retry": True}, by=by)

    def _move(self, session: Session, record: RequestRecord, state: str, detail: Mapping[str, Any], by: str) -> None:
        now, old = self.clock(), record.state
        record.state = check_move(record.id, old, state)  # type: ignore[arg-type]
        record.accepted = record.accepted or (now if state == "accepted" else None)
        record.ended = now if state in ENDED else None
        if state not in (*IN_WORK, "promoted"):
            record.batch = None
        append(session, now, record.id, state, old=old, by=by, detail=detail)
        if state in WITHDRAWN:
            self._destroy(session, record.id, f"the request was {state}")

    # ----------------------------------------------------------------------------------------------------- lease

    def take(self, owner: str, lease_seconds: float, now: datetime | None = None) -> list[Request]:
        """The requests to process now, for `owner` alone until the lease expires; all have the same `batch`.

        Requests that an earlier processor left in work come first, as the batch they were. Otherwise all accepted
        requests become `scheduled` as a new batch. Empty: nothing to do, and no lease is held.

        Raises:
            LeaseHeld: another owner has the lease; names it and says until when.
        """
        now = now or self.clock()
        with writing(self.engine) as session:
            lease.hold(session, owner, now, lease_seconds)
            left = list(session.scalars(_ordered(IN_WORK)))
            if not left:
                left, batch = list(session.scalars(_ordered(("accepted",)))), f"batch-{uuid.uuid4().hex[:12]}"
                for record in left:
                    record.batch = batch
                    self._move(session, record, "scheduled", {"batch": batch}, owner)
            else:
                first = left[0].batch
                left = [record for record in left if record.batch == first]
            if not left:
                lease.drop(session, owner)
            return [as_request(record) for record in left]

    def hold(self, owner: str, lease_seconds: float) -> None:
        """Take the lease without taking requests: nobody processes or rolls back at the same time.

        Raises:
            LeaseHeld: another owner has it.
        """
        with writing(self.engine) as session:
            lease.hold(session, owner, self.clock(), lease_seconds)

    def check_lease(self, owner: str) -> None:
        """LeaseHeld if `owner` lost the lease: for what changes elsewhere, before it changes."""
        with reading(self.engine) as session:
            lease.fence(session, owner, self.clock())

    def renew(self, owner: str, lease_seconds: float, now: datetime | None = None) -> datetime:
        """Keep the lease for another `lease_seconds`; LeaseHeld if somebody else took it over."""
        with writing(self.engine) as session:
            lease.fence(session, owner, now or self.clock())
            return lease.hold(session, owner, now or self.clock(), lease_seconds)

    def release(self, owner: str) -> None:
        """Give the lease back; nothing happens if `owner` does not have it."""
        with writing(self.engine) as session:
            lease.drop(session, owner)

    def holder(self) -> tuple[str, datetime] | None:
        """(owner, expiry) of the lease, if it holds."""
        with reading(self.engine) as session:
            return lease.holder(session, self.clock())

    # ------------------------------------------------------------------------------------------- rows and events

    def rows_requested(self, before: datetime | None = None) -> set[str]:
        """Hashes (`hashes.row`) of the rows of every request that was ever accepted (before a time)."""
        query = select(RowRecord.hash).join(RequestRecord).where(RequestRecord.accepted.is_not(None))
        if before is not None:
            query = query.where(RequestRecord.accepted < before)
        with reading(self.engine) as session:
            return set(session.scalars(query))

    def row_hashes(self, request_id: str) -> list[str]:
        """Hashes of a request's rows, without duplicates."""
        with reading(self.engine) as session:
            record_of(session, request_id)
            query = select(RowRecord.hash).where(RowRecord.request_id == request_id).order_by(RowRecord.number)
            return list(session.scalars(query))

    def rows(self, request_id: str) -> list[dict[str, Any]]:
        """The rows of a request, decrypted; UserError once their key is destroyed."""
        rows: list[dict[str, Any]] = self._payload(request_id)["rows"]
        return rows

    def content(self, request_id: str) -> dict[str, Any]:
        """What was asked, decrypted; UserError once the key is destroyed."""
        content: dict[str, Any] = self._payload(request_id)["content"]
        return content

    def readable(self, request_id: str) -> bool:
        """Whether the request's texts can still be decrypted."""
        with reading(self.engine) as session:
            payload = session.get(PayloadRecord, request_id)
            return payload is not None and payload.wrapped_key is not None

    def _payload(self, request_id: str) -> dict[str, Any]:
        with reading(self.engine) as session:
            record_of(session, request_id)
            payload = session.get(PayloadRecord, request_id)
        if payload is None or payload.wrapped_key is None or payload.ciphertext is None:
            when = f" on {payload.destroyed:%Y-%m-%d}" if payload and payload.destroyed else ""
            raise UserError(
                f"request {request_id}: the key of its rows was destroyed{when}; only their hashes are left"
            )
        return self.vault.opened(request_id, payload.wrapped_key, payload.ciphertext)

    def destroy_expired(self, keep: timedelta) -> list[str]:
        """Destroy the data keys of requests promoted longer ago than `keep`; their ids."""
        query = (
            select(RequestRecord.id)
            .join(PayloadRecord)
            .where(RequestRecord.state == "promoted", PayloadRecord.wrapped_key.is_not(None))
            .where(RequestRecord.ended <= self.clock() - keep)
        )
        with writing(self.engine) as session:
            expired = list(session.scalars(query))
            for name in expired:
                self._destroy(session, name, "requests.keep_rows has passed")
        if expired:
            forget_pages(self.engine)
        return expired

    def _destroy(self, session: Session, request_id: str, why: str) -> None:
        payload = session.get(PayloadRecord, request_id)
        if payload is not None and payload.wrapped_key is not None:
            payload.wrapped_key, payload.ciphertext, payload.destroyed = None, None, self.clock()
            append(session, self.clock(), request_id, "key_destroyed", detail={"why": why})

    def certificate(self, request_id: str) -> str | None:
        """The signed document of a promoted request; None before, and after a rollback."""
        with reading(self.engine) as session:
            promoted = record_of(session, request_id).state == "promoted"
            found = session.get(CertificateRecord, request_id) if promoted else None
            return None if found is None else found.document

    def events(self, request_id: str | None = None) -> list[Event]:
        """The log, of one request or whole, oldest first."""
        query = select(EventRecord).order_by(EventRecord.seq)
        if request_id is not None:
            query = query.where(EventRecord.request_id == request_id)
        with reading(self.engine) as session:
            return [Event(**json.loads(record.body), hash=record.hash) for record in session.scalars(query)]

    def head(self) -> tuple[int, str]:
        """(number, hash) of the newest entry: what a certificate or another system can note, for `audit`."""
        with reading(self.engine) as session:
            last = session.scalar(select(EventRecord).order_by(EventRecord.seq.desc()).limit(1))
            return (0, "") if last is None else (last.seq, last.hash)

    def audit(self, known: Sequence[str] = ()) -> list[str]:
        """Problems of the chain, and differences between the log and the tables; empty: none.

        `known`: hashes of entries noted elsewhere, which must still be there (an attacker who can write the database
        can also write a whole new chain).
        """
        with reading(self.engine) as session:
            return check_chain(session, known, identity)


def _ordered(states: Sequence[State]) -> Any:
    created = RequestRecord.created
    return select(RequestRecord).where(RequestRecord.state.in_(states)).order_by(created, RequestRecord.id)
