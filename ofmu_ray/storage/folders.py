"""Folders with a manifest: filled here and stored anywhere, stored anywhere and read here.

On a local disk or a shared folder a folder moves into its place by a rename. To a URI its files are copied and read
back; `manifest.json` says first that the folder is in the making, and last what it holds (sizes and SHA-256). Whoever
fetches it takes what the manifest names, checked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.storage import local
from ofmu_ray.storage.checksums import MANIFEST, Files, difference, fingerprints, sha256
from ofmu_ray.storage.names import PathLike, is_uri, join, local_path, without_credentials
from ofmu_ray.storage.places import atomic_write, is_file, locate, read_text
from ofmu_ray.storage.scratch import scratch
from ofmu_ray.storage.trouble import explained

CHUNK_BYTES = 16 << 20


@contextmanager
def atomic_dir(path: PathLike) -> Iterator[Path]:
    """A local folder to fill; at the end of the block it takes the place of `path`, on an exception it is removed.

    A folder that stood at `path` is replaced. At a URI the new one is there once its manifest is.

    Raises:
        StorageError: no room, no rights, no answer, or what was read back is not what was written.
    """
    if not is_uri(path):
        with explained(path), local.whole_folder(local_path(path)) as beside:
            yield beside
        return
    with scratch() as folder:
        with explained(folder, "temporary files"):
            yield folder
        with explained(path):
            upload(folder, path)


def upload(folder: Path, target: PathLike) -> None:
    """Copy a local folder to a URI, read it back, and write its manifest.

    Raises:
        StorageError: what was read back is not what was written.
        OSError: as pyarrow says it, after its attempts.
    """
    files = fingerprints(folder)
    filesystem, inside = locate(target)
    stale = {name for name in _listed(target) if name not in files and name != MANIFEST}
    atomic_write(join(target, MANIFEST), json.dumps({"complete": False}) + "\n")
    for name, written in files.items():
        with (folder / name).open("rb") as source, filesystem.open_output_stream(f"{inside}/{name}") as copy:
            shutil.copyfileobj(source, copy, CHUNK_BYTES)
        with filesystem.open_input_stream(f"{inside}/{name}") as stored:
            if sha256(stored) != written["sha256"]:
                raise StorageError(f"{without_credentials(target)}/{name}: what was read back is not what was written")
    for name in stale:
        filesystem.delete_file(f"{inside}/{name}")
    atomic_write(join(target, MANIFEST), json.dumps({"complete": True, "files": files}, indent=1) + "\n")


def fetched(path: PathLike, option: str = "storage") -> Path:
    """A local folder with the content of `path`: itself if it is local, else a copy that this machine keeps.

    The copy is made once for each content, by one process while others wait, and is checked by the manifest. A folder
    that came to the store by other means and has none is known by its files' sizes and times.

    Raises:
        UserError: nothing is there, or it was left half-written.
        StorageError: a file is not what the manifest says; no room, no rights, no answer.
    """
    if not is_uri(path):
        return local_path(path)
    from filelock import FileLock

    with explained(path, option):
        files, named = contents(path), without_credentials(path)
        if not files:
            raise UserError(f"{option} = {named}: nothing is there")
        place = _copies(path) / _digest(files)
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.is_dir():
                with local.whole_folder(place) as beside:
                    _download(path, files, beside)
    return place


def drop_copies(path: PathLike) -> None:
    """Delete what `fetched` keeps of a URI on this machine."""
    if is_uri(path):
        shutil.rmtree(_copies(path), ignore_errors=True)


def _copies(path: PathLike) -> Path:
    return local.node_folder() / "folders" / _digest(without_credentials(path))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def contents(path: PathLike) -> Files:
    """What a URI's folder holds: by its manifest, else {"bytes", "changed"} of what is listed; {}: nothing is there.

    Raises:
        UserError: it is being written, or was left half-written.
    """
    if not is_file(join(path, MANIFEST)):
        return _listed(path)
    content = json.loads(read_text(join(path, MANIFEST)))
    if "complete" not in content:  # someone else's file of this name
        return _listed(path)
    if not content["complete"]:
        raise UserError(
            f"{without_credentials(path)} is half-written: whatever wrote it was interrupted (the same command "
            "finishes it) or is still at it"
        )
    files: Files = content["files"]
    return files


def is_whole(path: PathLike) -> bool:
    """Whether a folder that `atomic_dir` made stands at `path`."""
    if not is_uri(path):
        return local_path(path).is_dir()
    manifest = join(path, MANIFEST)
    return is_file(manifest) and bool(json.loads(read_text(manifest)).get("complete"))


def _listed(path: PathLike) -> Files:
    from pyarrow.fs import FileSelector, FileType

    filesystem, inside = locate(path)
    found = filesystem.get_file_info(FileSelector(inside, recursive=True, allow_not_found=True))
    return {
        info.path[len(inside) :].lstrip("/"): {"bytes": info.size, "changed": info.mtime_ns}
        for info in found
        if info.type == FileType.File
    }


def _download(path: PathLike, files: Files, folder: Path) -> None:
    filesystem, inside = locate(path)
    for name, written in files.items():
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{without_credentials(path)}: its manifest names a file outside of it ({name})")
        target.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(f"{inside}/{name}") as stored, target.open("wb") as copy:
            shutil.copyfileobj(stored, copy, CHUNK_BYTES)
        reason = difference(target, written) if "sha256" in written else None
        if reason is not None:
            raise StorageError(f"{without_credentials(path)}: {reason}; it was damaged, write or upload it again")


@contextmanager
def new_mapped(path: PathLike) -> Iterator[IO[bytes]]:
    """A file that can be memory-mapped, to fill; it stands at `path` when the block has ended.

    For a URI it has no name on this machine, so that nothing of it is left however the process ends.
    """
    if not is_uri(path):
        with local_path(path).open("w+b") as file:
            yield file
        return
    with _nameless() as file:
        yield file
        file.seek(0)
        filesystem, inside = locate(path)
        with filesystem.open_output_stream(inside) as copy:
            shutil.copyfileobj(file, copy, CHUNK_BYTES)


def open_mapped(path: PathLike) -> IO[bytes]:
    """A file to memory-map; of a URI's, a copy of this process without a name on this machine."""
    if not is_uri(path):
        return local_path(path).open("rb")
    file = _nameless()
    filesystem, inside = locate(path)
    with filesystem.open_input_stream(inside) as stored:
        shutil.copyfileobj(stored, file, CHUNK_BYTES)
    file.seek(0)
    return file


def _nameless() -> IO[bytes]:
    folder = local.node_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # its user closes it
    return file
