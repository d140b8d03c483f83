"""Atomic files and folders on a local disk: written next to their target and renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ofmu_ray.storage.scratch import made


def write_whole(target: Path, data: bytes) -> None:
    """Write a file atomically; readers see the old content or the new. Creates folders as needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(staging, 0o666 & ~umask())  # mkstemp makes private files
        os.replace(staging, target)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it replaces `target` at the end of the block and is removed on an exception.

    A replacement takes two renames: in between `target` does not exist, but it is never incomplete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with made(target.parent, f".{target.name}.", ".part") as staging:
        yield staging
        _open_to_readers(staging)
        _swap(staging, target)


def _open_to_readers(folder: Path) -> None:
    """Give a folder's content the usual modes: mkdtemp and safetensors make private ones."""
    mask = umask()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        os.replace(new, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    os.replace(target, old)  # a folder may replace an empty one
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def node_folder() -> Path:
    """This machine's cache of URI content; safe to delete when nothing runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ofmu-ray"


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
