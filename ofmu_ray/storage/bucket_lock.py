"""A lock in a store that has none: marks, and lists that show them.

Who wants the lock writes a mark of its own, then lists, and has it if there is no other mark. Of two that come at once,
the later to write sees the earlier's, so never both have it; the one whose name sorts first stays, the other waits.
S3, Google's store and MinIO list what was just written, and pyarrow cannot write on condition.

The holder writes its mark again every `BEAT` seconds. One that a newcomer sees unchanged for `LEASE` seconds, by its
own clock, is that of a dead process.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ofmu_ray import progress
from ofmu_ray.errors import StorageError
from ofmu_ray.storage.names import without_credentials
from ofmu_ray.storage.owners import lives, owner_name
from ofmu_ray.storage.places import locate

MARK, RUNNING, STARTING = ".lock-", ".lock-running,", ".lock-starting,"  # a running one sorts first
BEAT, LEASE, POLL = 10.0, 90.0, 2.0
"""Seconds; `LEASE` is longer than a silent store is asked again, `POLL` than Google wants between two writes."""


@contextmanager
def marked(folder: str, refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Hold the lock of a URI in the block; wait for a sign of life of a holder on another machine, at most `LEASE`.

    Raises:
        StorageError: this process was silent for `LEASE` seconds, and another one took the lock: the block is ended.
        Exception: `refusal` of the name (`owners`) of a process that has the lock.
    """
    lock, done = _Lock(folder), threading.Event()
    thread = threading.Thread(target=lock.renew, args=(done,), name="lock", daemon=True)
    try:
        lock.take(refusal)
        thread.start()
        yield
    except KeyboardInterrupt:
        if not lock.lost:
            raise
        raise StorageError(
            f"{without_credentials(folder)}: this process was silent for {LEASE:.0f} s (paused, or cut off from the "
            "store), and another one has taken its work over; it goes on there"
        ) from None
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()
        for name in (lock.starting, lock.running):
            with suppress(OSError):  # a mark that stays is one of a dead process
                lock.remove(name)


def holder(folder: str) -> str | None:
    """The name of who has the lock, to be shown: of another machine's process, if its mark is new by this clock."""
    for name, changed in _Lock(folder).marks().items():
        alive = lives(_owner(name))
        if name.startswith(RUNNING) and (time.time() - changed / 1e9 < LEASE if alive is None else alive):
            return _owner(name)
    return None


def _owner(name: str) -> str:
    return name.partition(",")[2].replace(",", "/")


class _Lock:
    def __init__(self, folder: str) -> None:
        self.filesystem, inside = locate(folder)
        self.inside, owner = inside.rstrip("/"), owner_name().replace("/", ",")
        self.starting, self.running, self.lost = STARTING + owner, RUNNING + owner, False
        self.seen: dict[str, tuple[int, float]] = {}
        """Mark of another -> when it was written, by the store's clock, and when that was seen first, by this one."""

    def marks(self) -> dict[str, int]:
        """All marks -> when they were written."""
        from pyarrow.fs import FileSelector

        listed = self.filesystem.get_file_info(FileSelector(self.inside, allow_not_found=True))
        return {one.base_name: one.mtime_ns for one in listed if one.base_name.startswith(MARK)}

    def write(self, name: str) -> None:
        with self.filesystem.open_output_stream(f"{self.inside}/{name}") as file:
            file.write(_owner(name).encode())

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.inside}/{name}")

    def take(self, refusal: Callable[[str], Exception]) -> None:
        while True:
            marks = self.marks()
            others = sorted(marks.keys() - {self.starting})
            if not others and self.starting in marks:
                self.write(self.running)
                self.remove(self.starting)
                if not self._is_lost():  # paused before it wrote, until its first mark was taken for a dead one's
                    return
                self.remove(self.running)
            elif not others:
                self.write(self.starting)
            else:
                if self.starting in marks:  # make way, or show that this one waits
                    (self.remove if others[0] < self.starting else self.write)(self.starting)
                for name in others:
                    self._look(name, marks[name], refusal)
                time.sleep(POLL)

    def _look(self, name: str, changed: int, refusal: Callable[[str], Exception]) -> None:
        """Remove the mark of a dead process; raise if it is that of one at work."""
        owner, now, new = _owner(name), time.monotonic(), name not in self.seen
        alive = lives(owner)
        before, since = self.seen.setdefault(name, (changed, now))
        if name.startswith(RUNNING) and (alive or changed != before):
            raise refusal(owner)
        self.seen[name] = (changed, since if changed == before else now)
        if alive is False or now - self.seen[name][1] > LEASE:
            progress.note("lock", f"taken over from {owner}, which is gone")
            self.remove(name)
        elif new and name.startswith(RUNNING):
            progress.note("lock", f"{owner} has it; waiting for a sign of life, at most {LEASE:.0f} s")

    def renew(self, done: threading.Event) -> None:
        """Write the mark again until `done`; interrupt the program if another process has the lock."""
        while not done.wait(BEAT):
            with suppress(OSError):  # asked again
                if self._is_lost():
                    self.lost = True
                    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # in a script's `command &`
                    stop = signal.SIGTERM if ignored else signal.SIGINT
                    signal.pthread_kill(threading.main_thread().ident or 0, stop)
                    return
                self.write(self.running)

    def _is_lost(self) -> bool:
        return [name for name in self.marks() if name.startswith(RUNNING)] != [self.running]
