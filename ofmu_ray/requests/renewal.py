"""The lease of the ledger while somebody works on it: renewed by a thread, taken over from a dead process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

from ofmu_ray import progress
from ofmu_ray.errors import StorageError
from ofmu_ray.requests.lease import LeaseHeld
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.storage.owners import lives, owner_name


def drop_dead(ledger: Ledger) -> str | None:
    """Give back the lease of a process of this machine that is gone; its name. Others keep theirs until it expires."""
    holder = ledger.holder()
    if holder is None or lives(holder[0]) is not False:
        return None
    ledger.release(holder[0])
    return holder[0]


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
