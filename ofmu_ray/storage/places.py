"""Atomic files and folders at a local path or a URI."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ofmu_ray.errors import UserError
from ofmu_ray.storage import local
from ofmu_ray.storage.names import PathLike, absolute, is_uri, local_path, name_of, split_query, without_credentials
from ofmu_ray.storage.trouble import refusal

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

IMPATIENT_SECONDS = 10
DELETION_ATTEMPTS = 5
PARTIAL = ".partial-"
"""Separates the name of a folder being published from a random suffix."""


def locate(path: PathLike, option: str = "storage", *, wait: bool = True) -> tuple[FileSystem, str]:
    """pyarrow's file system of a local path or URI, and the path in it.

    `wait`: retry a store that does not respond for a minute (S3) or more (Google), else for a few seconds.

    Raises:
        UserError: pyarrow does not support the scheme (s3, gs, hdfs); `option` names the option to correct.
    """
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_uri(path):
        return LocalFileSystem(), str(local_path(path))
    try:
        filesystem, inside = FileSystem.from_uri(os.fspath(path) if wait else _impatient(path))
    except (ArrowInvalid, OSError) as error:
        reason = refusal(error) or (  # pyarrow looks up the region of an S3 bucket
            f"not a location pyarrow can open ({type(error).__name__}); use a local path, s3://bucket/key or "
            "gs://bucket/key"
        )
        raise UserError(f"{option} = {without_credentials(path)}: {reason}") from None
    if not wait:
        return filesystem, inside
    from ofmu_ray.storage.patient import patient

    return patient(filesystem), inside


def _impatient(uri: PathLike) -> str:
    """The URI with a limit of seconds instead of Google's 15 minutes; S3's default is short already."""
    stem, query = split_query(uri)
    limit = f"{'&' if query else '?'}retry_limit_seconds={IMPATIENT_SECONDS}"
    return stem + query + (limit if stem.startswith(("gs://", "gcs://")) else "")


def is_file(path: PathLike) -> bool:
    """Whether a file exists at `path`."""
    from pyarrow.fs import FileType

    filesystem, inside = locate(path)
    return bool(filesystem.get_file_info(inside).type == FileType.File)


def read_text(path: PathLike) -> str:
    """The content of a file.

    Raises:
        FileNotFoundError: no such file.
    """
    filesystem, inside = locate(path)
    with filesystem.open_input_stream(inside) as file:
        return str(file.readall().decode())


def write_text(path: PathLike, text: str) -> None:
    """Write a file of a folder that is not `published` yet; not atomic on a local disk."""
    filesystem, inside = locate(path)
    with filesystem.open_output_stream(inside) as file:
        file.write(text.encode())


def atomic_write(path: PathLike, content: str | bytes) -> None:
    """Write a file atomically; readers see the old content or the new. Creates local folders as needed."""
    data = content.encode() if isinstance(content, str) else content
    if not is_uri(path):
        local.write_whole(local_path(path), data)
        return
    filesystem, inside = locate(path)
    with filesystem.open_output_stream(inside) as file:  # an object appears once its upload is complete
        file.write(data)


def local_file(path: PathLike, folder: PathLike) -> Path:
    """A file on this machine: itself, or a copy of a URI in `folder`."""
    if not is_uri(path):
        return local_path(path)
    filesystem, inside = locate(path)
    copy = Path(folder, name_of(path))
    with filesystem.open_input_stream(inside) as file:
        copy.write_bytes(file.readall())
    return copy


def remove_file(path: PathLike) -> None:
    """Delete a file, if it exists."""
    if is_file(path):
        filesystem, inside = locate(path)
        filesystem.delete_file(inside)


def remove_folder(directory: PathLike) -> None:
    """Delete a folder, if it exists, and any half-published remains."""
    from pyarrow.fs import FileSelector, FileType

    filesystem, path = locate(directory)
    path = path.rstrip("/")
    siblings = filesystem.get_file_info(FileSelector(path.rpartition("/")[0], allow_not_found=True))
    halves = [i.path for i in siblings if i.type == FileType.Directory and i.path.startswith(f"{path}{PARTIAL}")]
    for folder in (path, *halves):
        # in a store a folder may have no object: Google's then lists none and cannot delete it
        for left in reversed(range(DELETION_ATTEMPTS)):
            try:
                filesystem.delete_dir_contents(folder, missing_dir_ok=True)
                break
            except FileNotFoundError:  # a deletion was retried after its response was lost, and the file was gone
                if not left:
                    raise
        if filesystem.get_file_info(folder).type == FileType.Directory:
            filesystem.delete_dir(folder)


@contextmanager
def published(directory: PathLike, marker: str) -> Iterator[str]:
    """A folder next to `directory` to write to; moved into place if the block succeeds, removed otherwise.

    Readers consider a folder complete if it contains `marker`. If another process published a complete folder in the
    meantime, that one stays. Local folders are renamed; object stores cannot rename a folder, so files are copied one
    by one, the marker last.
    """
    stem, query = split_query(absolute(directory))
    partial = f"{stem.rstrip('/')}{PARTIAL}{uuid.uuid4().hex[:12]}{query}"
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
        if Path(final, marker).exists():  # another process published the same content
            filesystem.delete_dir(partial)
            return
        if Path(final).exists():
            filesystem.delete_dir(final)
        os.replace(partial, final)
        return
    listing = filesystem.get_file_info(FileSelector(partial, recursive=True))
    files = sorted((info.path for info in listing if info.type == FileType.File), key=lambda p: p.endswith(marker))
    for path in files:
        target = final + path[len(partial) :]
        filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        filesystem.copy_file(path, target)
    filesystem.delete_dir(partial)
