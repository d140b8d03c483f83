"""Folders for a while: gone at the end of their block, and at the next one's beginning if their process was killed.

What lies in them may be the weights of a model that knows what is to be forgotten, gigabytes of them. A process holds
a lock (flock) on each of its folders, which ends with the process however that ends; a folder that nobody holds was
left behind. File systems that know no locks keep such folders.
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
    """An empty folder in the machine's place for temporary files, removed at the end of the block."""
    with made(Path(tempfile.gettempdir()), PREFIX, "") as folder:
        yield folder


@contextmanager
def made(parent: Path, prefix: str, suffix: str) -> Iterator[Path]:
    """A new folder `<parent>/<prefix>...<suffix>`, removed at the end of the block unless it was moved away.

    Others of such a name that nobody holds any more are removed first.
    """
    for left in parent.glob(f"{escape(prefix)}*{escape(suffix)}"):
        _remove_abandoned(left)
    folder, lock = _held(parent, prefix, suffix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _held(parent: Path, prefix: str, suffix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=suffix))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # someone took it for abandoned before it was held
            continue
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # no folder, another user's, or gone meanwhile
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or no locks here
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
