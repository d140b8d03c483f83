"""Files that appear whole or not at all, on a local disk or at a URI (s3://, gs://; pyarrow's file systems).

A local file is written beside its place, flushed to disk and moved into it. At an object store the upload of one
object is atomic by itself; a folder is uploaded object by object, so write what says that it is complete (a run's
``manifest.json``) last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def is_uri(path: PathLike) -> bool:
    """Whether `path` names a remote place such as s3://bucket/key (file:// counts as local)."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def local_path(path: PathLike) -> Path:
    """The absolute local path of a path or a file:// URI.

    Raises:
        ValueError: the path is remote.
    """
    if is_uri(path):
        raise ValueError(f"{os.fspath(path)} is not a local path")
    return Path(os.fspath(path).removeprefix("file://")).absolute()


def join(root: PathLike, *parts: str) -> str:
    """`root`/part/part, for paths and URIs alike."""
    return "/".join([os.fspath(root).rstrip("/"), *parts]) if is_uri(root) else os.path.join(root, *parts)


def exists(path: PathLike) -> bool:
    """Whether a file or folder is there."""
    if not is_uri(path):
        return local_path(path).exists()
    from pyarrow.fs import FileType

    filesystem, name = _remote(path)
    return bool(filesystem.get_file_info(name).type != FileType.NotFound)


def read_bytes(path: PathLike) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_uri(path):
        return local_path(path).read_bytes()
    filesystem, name = _remote(path)
    with filesystem.open_input_stream(name) as stream:
        return bytes(stream.read())


def atomic_write(path: PathLike, content: str | bytes) -> None:
    """Write a file whole; a reader sees the old content or the new, never a part. Folders are made as needed."""
    data = content.encode() if isinstance(content, str) else content
    if is_uri(path):
        filesystem, name = _remote(path)
        with filesystem.open_output_stream(name) as stream:
            stream.write(data)
        return
    target = local_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp makes private files
        os.replace(beside, target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(path: PathLike) -> Iterator[Path]:
    """A local folder to fill; at the end of the block it takes the place of `path`, on an exception it is removed.

    A folder that stood at `path` is replaced. Between the two moves of the replacement there is an instant in which
    neither is there, but never a moment with a half-filled folder.
    """
    if is_uri(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            _upload(Path(folder), path)
        return
    target = local_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        yield beside
        os.chmod(beside, 0o777 & ~_umask())
        _swap(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


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


def _upload(folder: Path, uri: PathLike) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    filesystem, name = _remote(uri)
    filesystem.create_dir(name, recursive=True)
    copy_files(str(folder), name, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem)


def _remote(uri: PathLike) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    filesystem, name = FileSystem.from_uri(os.fspath(uri))
    return filesystem, str(name)


def _umask() -> int:
    """The process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
