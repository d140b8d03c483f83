"""The lease of the ledger while somebody works on it: renewed by a thread, taken over from a dead process."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from sqlalchemy.exc import SQLAlchemyError

from ofmu_ray import progress
from ofmu_ray.errors import StorageError
from ofmu_ray.requests.lease import LeaseHeld
from ofmu_ray.requests.ledger import Ledger

PARTS = 4
"""Of an owner's name: host, process, start of the process, random."""


def owner_name() -> str:
    """A name of this process that no other one has: host/process/start/random."""
    return f"{socket.gethostname()}/{os.getpid()}/{_started(os.getpid())}/{uuid.uuid4().hex[:8]}"


def drop_dead(ledger: Ledger) -> str | None:
    """Give back the lease of a process of this machine that is gone; its name. Others keep theirs until it expires."""
    holder = ledger.holder()
    parts = holder[0].split("/") if holder else []
    if holder is None or len(parts) != PARTS or parts[0] != socket.gethostname() or not parts[1].isdigit():
        return None
    if _started(int(parts[1])) == parts[2]:
        return None
    ledger.release(holder[0])
    return holder[0]


def _started(process: int) -> str:
    """When a process started, in seconds since this machine did; empty if there is none of this number.

    Not the time of day: that changes when the clock is set, and a living process would look like another one.
    """
    try:
        found = psutil.Process(process)
        return "" if found.status() == psutil.STATUS_ZOMBIE else f"{found.create_time() - psutil.boot_time():.2f}"
    except psutil.Error:
        return ""


@contextmanager
def leased(ledger: Ledger, seconds: float) -> Iterator[str]:
    """Hold the lease in the block; the owner's name. Of a process of this machine that is gone, it is taken over.

    Raises:
        LeaseHeld: somebody else is at work.
    """
    if (dead := drop_dead(ledger)) is not None:
        progress.note("lease", f"taken over from {dead}, which is gone")
    owner = owner_name()
    ledger.hold(owner, seconds)
    try:
        with renewed(ledger, owner, seconds):
            yield owner
    finally:
        ledger.release(owner)


@contextmanager
def renewed(ledger: Ledger, owner: str, seconds: float) -> Iterator[None]:
    """Renew the lease in the block, three times in its duration.

    A lease that is lost shows at the next `move`, which the ledger refuses; a database that does not answer is asked
    again.
    """
    done = threading.Event()

    def renew() -> None:
        while not done.wait(seconds / 3):
            try:
                ledger.renew(owner, seconds)
            except LeaseHeld:
                return
            except (StorageError, SQLAlchemyError):
                continue

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
