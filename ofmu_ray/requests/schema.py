"""Tables of the ledger. No column holds the text of a row: texts are ciphertext, rows are keyed hashes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, DateTime, Dialect, ForeignKey, Index, Integer, LargeBinary, MetaData, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

REVISION = "0001"
"""The newest migration (`migrations/versions/`)."""


class Moment(TypeDecorator[datetime]):
    """A time with a zone, in UTC. SQLite forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        assert value is None or value.tzinfo is not None, "a time without a zone"
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {datetime: Moment, str: Text, bytes: LargeBinary}


class RequestRecord(Base):
    """One request, as it is now; the events say how it came to this."""

    __tablename__ = "ofmu_requests"

    id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    content_hash: Mapped[str]
    """HMAC-SHA256 of what was asked."""
    state: Mapped[str] = mapped_column(index=True)
    created: Mapped[datetime]
    deadline: Mapped[datetime]
    row_count: Mapped[int] = mapped_column(Integer)
    rows_digest: Mapped[str]
    """SHA-256 of the row hashes in order."""
    data: Mapped[str]
    """Fingerprint of the training data that the rows were found in."""
    by: Mapped[str]
    """Who submitted it: the token's id, or the user of the command line."""
    accepted: Mapped[datetime | None]
    """First acceptance; from then on its rows are never retained."""
    ended: Mapped[datetime | None]
    """When it was promoted, rejected or superseded; null while it is open."""
    batch: Mapped[str | None]
    """What it is processed together with."""


class RowRecord(Base):
    """A row of a request, as HMAC-SHA256 of its normalised digest."""

    __tablename__ = "ofmu_rows"

    request_id: Mapped[str] = mapped_column(ForeignKey("ofmu_requests.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    hash: Mapped[str]


class PayloadRecord(Base):
    """What a request says, encrypted. Without the key it says nothing, and the key can be destroyed."""

    __tablename__ = "ofmu_payloads"

    request_id: Mapped[str] = mapped_column(ForeignKey("ofmu_requests.id"), primary_key=True)
    wrapped_key: Mapped[bytes | None]
    ciphertext: Mapped[bytes | None]
    destroyed: Mapped[datetime | None]


class EventRecord(Base):
    """An entry of the chained log: canonical JSON, and the SHA-256 of it."""

    __tablename__ = "ofmu_events"
    __table_args__ = (Index("ix_ofmu_events_request_id", "request_id"),)

    seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False
    )
    request_id: Mapped[str | None]
    body: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)


class LeaseRecord(Base):
    """Who may process now; one row."""

    __tablename__ = "ofmu_lease"

    name: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    taken: Mapped[datetime]
    expires: Mapped[datetime]


class SecretRecord(Base):
    """Keys of the ledger itself, wrapped by the master key."""

    __tablename__ = "ofmu_secrets"

    name: Mapped[str] = mapped_column(primary_key=True)
    wrapped: Mapped[bytes]


class CertificateRecord(Base):
    """The newest certificate of a request, as signed."""

    __tablename__ = "ofmu_certificates"

    request_id: Mapped[str] = mapped_column(ForeignKey("ofmu_requests.id"), primary_key=True)
    document: Mapped[str]
    created: Mapped[datetime]


class TokenRecord(Base):
    """A bearer token of the HTTP service, as the SHA-256 of its 256 random bits."""

    __tablename__ = "ofmu_tokens"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[str]
    created: Mapped[datetime]
    expires: Mapped[datetime]
    revoked: Mapped[datetime | None]
