"""Bearer tokens of the HTTP service: 256 random bits, stored as SHA-256, with scopes and an expiry."""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args

from sqlalchemy import select

from ofmu_ray.errors import UserError
from ofmu_ray.requests.chain import append
from ofmu_ray.requests.database import reading, writing
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.schema import TokenRecord

Scope = Literal["submit", "read", "operate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "ofmu_"
"""So that scanners find a token that was committed by mistake."""


@dataclass(frozen=True)
class Token:
    """What is known of a token; not the token."""

    id: str
    name: str
    scopes: tuple[str, ...]
    created: datetime
    expires: datetime
    revoked: datetime | None

    def problem(self, now: datetime) -> str | None:
        """Why it is not valid, if it is not."""
        if self.revoked is not None:
            return "this token was revoked"
        return "this token has expired" if self.expires <= now else None


def create(ledger: Ledger, name: str, scopes: Sequence[str], lifetime: timedelta, by: str = "") -> tuple[Token, str]:
    """(token, secret); the secret is shown once and never stored.

    Raises:
        UserError: a name that is not plain, no or an unknown scope, no lifetime.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}", name):
        raise UserError("--name: must be 1 to 64 letters, digits or _ . @ -, a letter or digit first")
    if not scopes or (unknown := set(scopes) - set(SCOPES)):
        raise UserError(f"--scopes: must be some of {', '.join(SCOPES)}" + (f", not {unknown}" if scopes else ""))
    if lifetime <= timedelta(0):
        raise UserError("--expires: must be greater than 0")
    secret, now = PREFIX + secrets.token_urlsafe(32), ledger.clock()
    record = TokenRecord(
        id=f"tok-{uuid.uuid4().hex[:12]}", name=name, hash=_hash(secret), scopes=" ".join(sorted(set(scopes))),
        created=now, expires=now + lifetime,
    )  # fmt: skip
    with writing(ledger.engine) as session:
        session.add(record)
        detail = {"token": record.id, "name": name, "scopes": record.scopes, "expires": record.expires.isoformat()}
        append(session, now, None, "token_created", by=by, detail=detail)
        return _token(record), secret


def revoke(ledger: Ledger, token_id: str, by: str = "") -> Token:
    """UserError if there is no such token; a revoked one stays revoked."""
    with writing(ledger.engine) as session:
        record = session.get(TokenRecord, token_id)
        if record is None:
            raise UserError(f"token {token_id[:40]!r}: there is none with this id; see `ofmu requests token list`")
        if record.revoked is None:
            record.revoked = ledger.clock()
            append(session, record.revoked, None, "token_revoked", by=by, detail={"token": token_id})
        return _token(record)


def tokens(ledger: Ledger) -> list[Token]:
    """All tokens, oldest first."""
    with reading(ledger.engine) as session:
        return [_token(record) for record in session.scalars(select(TokenRecord).order_by(TokenRecord.created))]


def find(ledger: Ledger, secret: str) -> Token | None:
    """The token with this secret, valid or not."""
    with reading(ledger.engine) as session:
        record = session.scalar(select(TokenRecord).where(TokenRecord.hash == _hash(secret)))
        return None if record is None else _token(record)


def _hash(secret: str) -> str:
    """A plain hash is enough for 256 random bits: there is nothing to guess."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _token(record: TokenRecord) -> Token:
    return Token(record.id, record.name, tuple(record.scopes.split()), record.created, record.expires, record.revoked)
