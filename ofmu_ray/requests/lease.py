"""The lease of the ledger: who may process now. All functions run in the caller's transaction."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from ofmu_ray.errors import UserError
from ofmu_ray.requests.schema import LeaseRecord

LEASE = "process"


class LeaseHeld(UserError):
    """Another processor works on the ledger, or took it over."""

    status = 1


def hold(session: Session, owner: str, now: datetime, seconds: float) -> datetime:
    lease = session.get(LeaseRecord, LEASE)
    if lease is not None and lease.owner != owner and lease.expires > now:
        raise LeaseHeld(
            f"{lease.owner} is processing, and has the lease until {lease.expires:%Y-%m-%d %H:%M:%S} UTC unless it "
            "renews it; wait for it, or start again after that"
        )
    expires = now + timedelta(seconds=seconds)
    if lease is None:
        session.add(LeaseRecord(name=LEASE, owner=owner, taken=now, expires=expires))
    else:
        taken = lease.taken if lease.owner == owner else now
        lease.owner, lease.taken, lease.expires = owner, taken, expires
    return expires


def holder(session: Session, now: datetime) -> tuple[str, datetime] | None:
    """(owner, expiry) of a lease that holds."""
    lease = session.get(LeaseRecord, LEASE)
    return None if lease is None or lease.expires <= now else (lease.owner, lease.expires)


def drop(session: Session, owner: str) -> None:
    if (lease := session.get(LeaseRecord, LEASE)) is not None and lease.owner == owner:
        session.delete(lease)


def fence(session: Session, owner: str | None, now: datetime) -> None:
    """A processor that was paused longer than its lease must not write over its successor's work."""
    lease = session.get(LeaseRecord, LEASE)
    if owner is not None and (lease is None or lease.owner != owner):
        now_has = "nobody has" if lease is None else f"{lease.owner} has"
        raise LeaseHeld(f"{owner} lost the lease of the ledger, which {now_has} now: its work was not recorded")
    if owner is None and lease is not None and lease.expires > now:
        raise LeaseHeld(f"{lease.owner} is processing this request until {lease.expires:%Y-%m-%d %H:%M:%S} UTC")
