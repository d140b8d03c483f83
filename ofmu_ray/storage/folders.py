"""Folders with a manifest: filled locally and stored anywhere, or stored anywhere and read locally.

On a local disk or a shared folder, a folder is renamed into place. At a URI its files are copied and read back;
`manifest.json` first marks the folder as incomplete and finally lists its content (sizes and SHA-256). Readers fetch
and check exactly the files in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """A local folder to fill; it replaces `path` at the end of the block and is removed on an exception.

    At a URI, the new folder exists once its manifest does.

    Raises:
        StorageError: no space, no permission, no response, or the data read back differs.
    """
    with new_folder(path) as folder:
        yield folder.path


@contextmanager
def new_folder(path: PathLike) -> Iterator[NewFolder]:
    """`atomic_dir` for a content that is larger than the local disk: files may leave for the URI early."""
    if not is_uri(path):
        with explained(path), local.whole_folder(local_path(path)) as staging:
            yield NewFolder(staging)
        return
    with scratch() as place:
        folder = _Upload(place, path)
        with explained(place, "temporary files"):
            yield folder
        folder.finish()


@dataclass
class NewFolder:
    """A folder that is being written."""

    path: Path
    """Where to put its files."""

    def relative(self, path: str) -> str:
        """`path` from here, so that both may move together; as it is if nothing but the root is above both."""
        here, there = self.path.absolute(), Path(path).absolute()
        common = Path(os.path.commonpath([here, there]))
        return str(there) if common == Path(common.anchor) else os.path.relpath(there, here)

    def flush(self) -> None:
        """Nothing more will be written to the files in `path`: at a URI they are uploaded and deleted here.

        Raises:
            StorageError: no permission, no response, or the data read back differs.
        """


@dataclass
class _Upload(NewFolder):
    target: PathLike
    files: Files = field(default_factory=dict)

    def relative(self, path: str) -> str:
        return str(Path(path).absolute())  # at a URI there is no way to a local folder

    def flush(self) -> None:
        with explained(self.target):
            if not self.files:
                atomic_write(join(self.target, MANIFEST), json.dumps({"complete": False}) + "\n")
            filesystem, inside = locate(self.target)
            new = fingerprints(self.path)
            for name, written in new.items():
                with (self.path / name).open("rb") as source, filesystem.open_output_stream(f"{inside}/{name}") as copy:
                    shutil.copyfileobj(source, copy, CHUNK_BYTES)
                with filesystem.open_input_stream(f"{inside}/{name}") as stored:
                    if sha256(stored) != written["sha256"]:
                        place = f"{without_credentials(self.target)}/{name}"
                        raise StorageError(f"{place}: the data read back differs from what was written")
                (self.path / name).unlink()
            self.files |= new

    def finish(self) -> None:
        """Upload the rest, delete what is there of an earlier folder, and write the manifest."""
        self.flush()
        with explained(self.target):
            filesystem, inside = locate(self.target)
            for name in _listed(self.target):
                if name not in self.files and name != MANIFEST:
                    filesystem.delete_file(f"{inside}/{name}")
            files = dict(sorted(self.files.items()))
            atomic_write(join(self.target, MANIFEST), json.dumps({"complete": True, "files": files}, indent=1) + "\n")


def fetched(path: PathLike, option: str = "storage") -> Path:
    """A local folder with the content of `path`: itself if it is local, else a copy cached on this machine.

    One process makes the copy, once per content, while others wait; it is checked against the manifest. A folder
    without a manifest, uploaded by other means, is identified by the sizes and times of its files.

    Raises:
        UserError: nothing is there, or it is incomplete.
        StorageError: a file does not match the manifest; no space, no permission, no response.
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
                with local.whole_folder(place) as staging:
                    _download(path, files, staging)
    return place


def drop_copies(path: PathLike) -> None:
    """Delete this machine's copies of a URI made by `fetched`."""
    if is_uri(path):
        shutil.rmtree(_copies(path), ignore_errors=True)


def _copies(path: PathLike) -> Path:
    return local.node_folder() / "folders" / _digest(without_credentials(path))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def contents(path: PathLike) -> Files:
    """Content of a URI's folder: from its manifest, else {"bytes", "changed"} of the listed files; {}: nothing there.

    Raises:
        UserError: it is incomplete.
    """
    if not is_file(join(path, MANIFEST)):
        return _listed(path)
    content = json.loads(read_text(join(path, MANIFEST)))
    if "complete" not in content:  # another program's file of this name
        return _listed(path)
    if not content["complete"]:
        raise UserError(
            f"{without_credentials(path)} is incomplete: its writer was interrupted (the same command finishes it) "
            "or is still running"
        )
    files: Files = content["files"]
    return files


def is_whole(path: PathLike) -> bool:
    """Whether a complete folder of `atomic_dir` is at `path`."""
    if not is_uri(path):
        return local_path(path).is_dir()
    manifest = join(path, MANIFEST)
    return is_file(manifest) and bool(json.loads(read_text(manifest)).get("complete"))


def _listed(path: PathLike) -> Files:
    from pyarrow.fs import FileSelector, FileType

    filesystem, inside = locate(path)
    listing = filesystem.get_file_info(FileSelector(inside, recursive=True, allow_not_found=True))
    return {
        info.path[len(inside) :].lstrip("/"): {"bytes": info.size, "changed": info.mtime_ns}
        for info in listing
        if info.type == FileType.File
    }


def _download(path: PathLike, files: Files, folder: Path) -> None:
    filesystem, inside = locate(path)
    for name, written in files.items():
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{without_credentials(path)}: its manifest lists a file outside the folder ({name})")
        target.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(f"{inside}/{name}") as stored, target.open("wb") as copy:
            shutil.copyfileobj(stored, copy, CHUNK_BYTES)
        reason = difference(target, written) if "sha256" in written else None
        if reason is not None:
            raise StorageError(
                f"{without_credentials(path)}: {reason}; the folder is damaged, write or upload it again"
            )


@contextmanager
def new_mapped(path: PathLike) -> Iterator[IO[bytes]]:
    """A file to fill that can be memory-mapped; it is at `path` after the block.

    For a URI it has no name on this machine, so nothing is left however the process ends.
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
    """A file to memory-map; for a URI, an unnamed copy of this process."""
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
    file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # the caller closes it
    return file
