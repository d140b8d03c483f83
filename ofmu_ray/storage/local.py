"""Files and folders on a local disk that appear whole: written beside their place and moved into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ofmu_ray.storage.scratch import made


def write_whole(target: Path, data: bytes) -> None:
    """Write a file whole; a reader sees the old content or the new, never a part. Folders are made as needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(beside, 0o666 & ~umask())  # mkstemp makes private files
        os.replace(beside, target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; at the end of the block it takes the place of `target`, on an exception it is removed.

    A folder that stood at `target` is replaced. Between the two moves of the replacement there is an instant in which
    neither is there, but never a moment with a half-filled folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with made(target.parent, f".{target.name}.", ".part") as beside:
        yield beside
        os.chmod(beside, 0o777 & ~umask())
        _swap(beside, target)


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
    """Where this machine keeps copies of what lies at URIs; whatever is there may be deleted when nothing runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ofmu-ray"


def umask() -> int:
    """The process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
