"""Files, folders and URIs behind one pair: a pyarrow file system and a path in it."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import ArrowInvalid
from pyarrow import fs as pafs

from ofmu_ray.errors import UserError


def is_uri(path: str) -> bool:
    """Whether `path` names a file system of its own (s3://, gs://, file://)."""
    return "://" in path


def shown(path: str) -> str:
    """`path` as messages may show it: without the parts of a URI that can hold credentials."""
    return re.sub(r"://[^/@]*@", "://", path.split("?", 1)[0]) if is_uri(path) else path


def join(base: str, *names: str) -> str:
    """`base` with path parts appended, in front of the query when `base` is a URI that has one."""
    if not is_uri(base):
        return os.path.join(base, *names)
    stem, mark, query = base.partition("?")
    return "/".join([stem.rstrip("/"), *names]) + mark + query


def absolute(path: str) -> str:
    """`path` so that it means the same in another process; URIs stay."""
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def under(root: str | None, path: str) -> str:
    """A data path as the user wrote it, seen from `data.root`; URIs, absolute and builtin: paths stand alone."""
    if root is None or is_uri(path) or os.path.isabs(path) or path.startswith("builtin:"):
        return path
    return join(root, path)


def locate(path: str, option: str = "storage") -> tuple[pafs.FileSystem, str]:
    """File system and path of a local path or URI.

    Raises UserError when the scheme is not one that pyarrow serves (s3, gs, hdfs, file).
    """
    if not is_uri(path):
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        filesystem, inside = pafs.FileSystem.from_uri(path)
    except (ArrowInvalid, OSError) as error:
        raise UserError(
            f"{option} = {shown(path)}: not a location pyarrow can open ({type(error).__name__}); "
            "use a local path, s3://bucket/key or gs://bucket/key"
        ) from None
    return filesystem, inside


@contextmanager
def published(directory: str, marker: str) -> Iterator[str]:
    """A folder beside `directory` to write into; moved into place when the block ends well, removed otherwise.

    Readers take a folder for complete when it holds `marker`. Local folders move by one rename; on object stores,
    which cannot rename a folder, files are copied one by one and the marker last.
    """
    partial = join(*_split_last(directory, f".partial-{uuid.uuid4().hex[:12]}"))
    filesystem, path = locate(partial)
    filesystem.create_dir(path, recursive=True)
    try:
        yield partial
        _publish(filesystem, path, locate(directory)[1], marker)
    except BaseException:
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)
        raise


def has(path: str) -> bool:
    """Whether a file stands at `path`."""
    filesystem, inside = locate(path)
    return bool(filesystem.get_file_info(inside).type == pafs.FileType.File)


def read_text(path: str) -> str:
    filesystem, inside = locate(path)
    with filesystem.open_input_stream(inside) as file:
        return str(file.readall().decode())


def write_text(path: str, text: str) -> None:
    filesystem, inside = locate(path)
    with filesystem.open_output_stream(inside) as file:
        file.write(text.encode())


def remove(directory: str) -> None:
    """Delete a folder and all in it, if it is there."""
    filesystem, path = locate(directory)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def _split_last(directory: str, suffix: str) -> tuple[str, str]:
    """The folder above `directory` and its last name with `suffix` appended."""
    stem, mark, query = directory.partition("?") if is_uri(directory) else (directory, "", "")
    head, _, last = stem.rstrip("/").rpartition("/")
    return (head or ".") + mark + query, last + suffix


def _publish(filesystem: pafs.FileSystem, partial: str, final: str, marker: str) -> None:
    if isinstance(filesystem, pafs.LocalFileSystem):
        if Path(final, marker).exists():  # another process published the same content meanwhile
            filesystem.delete_dir(partial)
            return
        if Path(final).exists():
            filesystem.delete_dir(final)
        os.replace(partial, final)
        return
    found = filesystem.get_file_info(pafs.FileSelector(partial, recursive=True))
    files = sorted((info.path for info in found if info.type == pafs.FileType.File), key=lambda p: p.endswith(marker))
    for path in files:
        target = final + path[len(partial) :]
        filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        filesystem.copy_file(path, target)
    filesystem.delete_dir(partial)
