"""Temporary folders: removed at the end of their block, or by the next one if their process was killed.

They may contain gigabytes of weights of a model that still knows the forget rows. A process locks (flock) each of its
folders; the lock ends with the process, so an unlocked folder is abandoned. On file systems without locks, abandoned
folders stay.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

PREFIX = "ofmu_scratch_"


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder in the system's temporary directory, removed at the end of the block."""
    with made(Path(tempfile.gettempdir()), PREFIX, "") as folder:
        yield folder


@contextmanager
def made(parent: Path, prefix: str, suffix: str) -> Iterator[Path]:
    """A new folder `<parent>/<prefix>...<suffix>`, removed at the end of the block unless it was moved.

    Abandoned folders with such a name are removed first.
    """
    for left in parent.glob(f"{escape(prefix)}*{escape(suffix)}"):
        _remove_abandoned(left)
    folder, lock = _locked(parent, prefix, suffix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(parent: Path, prefix: str, suffix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=suffix))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it as abandoned before it was locked
            continue
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # no folder, another user's, or gone
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or no locks here
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
