"""Where files lie and how they appear: local paths and URIs (s3://, gs://), whole or not at all.

Runs live on a folder that all nodes share: `atomic_write` and `atomic_dir` write beside the place and move into it.
Sources, tokens and batch plans may also live in an object store: `locate` opens both by pyarrow's file systems, and
`published` makes a folder complete by the file that is written last. pyarrow is imported where it is used, so that
importing this module stays cheap.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

PathLike = str | os.PathLike[str]

# ------------------------------------------------------------------------------------------------------------ names


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
        raise ValueError(f"{without_credentials(path)} is not a local path")
    text = os.fspath(path)
    text = unquote(text.removeprefix("file://")) if text.startswith("file://") else os.path.expanduser(text)
    return Path(os.path.abspath(text))


def absolute(path: PathLike) -> str:
    """`path` so that it means the same in another process; URIs stay."""
    return os.fspath(path) if is_uri(path) else str(local_path(path))


def join(root: PathLike, *parts: str) -> str:
    """`root`/part/part, for paths and URIs alike; in front of the query when `root` is a URI that has one."""
    if not is_uri(root):
        return os.path.join(root, *parts)
    stem, query = _split_query(root)
    return "/".join([stem.rstrip("/"), *parts]) + query


def without_credentials(path: PathLike) -> str:
    """`path` as messages may show it: without the parts of a URI that can hold credentials."""
    return re.sub(r"://[^/@]*@", "://", _split_query(path)[0])


def _split_query(path: PathLike) -> tuple[str, str]:
    """A URI without its query, and the query with its question mark; a local path whole."""
    if not is_uri(path):
        return os.fspath(path), ""
    stem, mark, query = os.fspath(path).partition("?")
    return stem, mark + query


# ------------------------------------------------------------------------------------------- local disk or object store


def locate(path: PathLike, option: str = "storage") -> tuple[FileSystem, str]:
    """pyarrow's file system of a local path or URI, and the path in it.

    Raises:
        UserError: the scheme is not one that pyarrow serves (s3, gs, hdfs); `option` is what the user can correct.
    """
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_uri(path):
        return LocalFileSystem(), str(local_path(path))
    try:
        filesystem, inside = FileSystem.from_uri(os.fspath(path))
    except (ArrowInvalid, OSError) as error:
        raise UserError(
            f"{option} = {without_credentials(path)}: not a location pyarrow can open ({type(error).__name__}); "
            "use a local path, s3://bucket/key or gs://bucket/key"
        ) from None
    return filesystem, inside


def is_file(path: PathLike) -> bool:
    """Whether a file stands at `path`."""
    from pyarrow.fs import FileType

    filesystem, inside = locate(path)
    return bool(filesystem.get_file_info(inside).type == FileType.File)


def read_text(path: PathLike) -> str:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    filesystem, inside = locate(path)
    with filesystem.open_input_stream(inside) as file:
        return str(file.readall().decode())


def write_text(path: PathLike, text: str) -> None:
    """Write a file of a folder that is not `published` yet; on a local disk it may be left half-written."""
    filesystem, inside = locate(path)
    with filesystem.open_output_stream(inside) as file:
        file.write(text.encode())


def remove_folder(directory: PathLike) -> None:
    """Delete a folder and all in it, if it is there."""
    from pyarrow.fs import FileType

    filesystem, path = locate(directory)
    if filesystem.get_file_info(path).type == FileType.Directory:
        filesystem.delete_dir(path)


@contextmanager
def published(directory: PathLike, marker: str) -> Iterator[str]:
    """A folder beside `directory` to write into; moved into place when the block ends well, removed otherwise.

    Readers take a folder for complete when it holds `marker`. Where another process published a complete folder
    meanwhile, that one stays. Local folders move by one rename; on object stores, which cannot rename a folder, files
    are copied one by one and the marker last.
    """
    stem, query = _split_query(absolute(directory))
    partial = f"{stem.rstrip('/')}.partial-{uuid.uuid4().hex[:12]}{query}"
    filesystem, path = locate(partial)
    filesystem.create_dir(path, recursive=True)
    try:
        yield partial
        _publish(filesystem, path, locate(directory)[1], marker)
    except BaseException:
        remove_folder(partial)
        raise


def _publish(filesystem: FileSystem, partial: str, final: str, marker: str) -> None:
    from pyarrow.fs import FileSelector, FileType, LocalFileSystem

    if isinstance(filesystem, LocalFileSystem):
        if Path(final, marker).exists():  # another process published the same content meanwhile
            filesystem.delete_dir(partial)
            return
        if Path(final).exists():
            filesystem.delete_dir(final)
        os.replace(partial, final)
        return
    found = filesystem.get_file_info(FileSelector(partial, recursive=True))
    files = sorted((info.path for info in found if info.type == FileType.File), key=lambda p: p.endswith(marker))
    for path in files:
        target = final + path[len(partial) :]
        filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        filesystem.copy_file(path, target)
    filesystem.delete_dir(partial)


# ------------------------------------------------------------------------------------------------------- local disk


def atomic_write(path: PathLike, content: str | bytes) -> None:
    """Write a local file whole; a reader sees the old content or the new, never a part. Folders are made as needed.

    Raises:
        ValueError: the path is remote.
    """
    data = content.encode() if isinstance(content, str) else content
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

    Raises:
        ValueError: the path is remote.
    """
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


def _umask() -> int:
    """The process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
