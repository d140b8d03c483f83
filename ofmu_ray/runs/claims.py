"""A run's name: its folder belongs to one configuration (run.json), and to one process at a time (.lock*)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ofmu_ray.config import ELASTIC, WHERE_KEPT, SourceConfig, flatten
from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.runs.job import remove_text
from ofmu_ray.storage import (
    PathLike,
    atomic_write,
    is_file,
    is_uri,
    join,
    locate,
    name_of,
    read_text,
    remove_file,
    remove_folder,
)
from ofmu_ray.storage.bucket_lock import MARK, holder, marked
from ofmu_ray.training.checkpoint_list import RAY_TRAIN_LIST, local_checkpoints

RECORD = "run.json"
LOCK = ".lock"
SHOWN = 8
"""Different options that a message names."""


@dataclass(frozen=True)
class Claim:
    """What a run's folder is claimed for."""

    home: str
    """Folder or URI."""
    command: str
    """unlearn, train or sweep."""
    config_hash: str
    """Hash of everything that determines the outcome."""
    options: Mapping[str, Any]
    """The configuration as it may be shown, nested."""
    overwrite: bool = False
    """Whether a run of this command with other options or rows may be deleted."""
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    """What the run reads, by stream: a finished run belongs to its rows, too."""
    root: str | None = None
    """Base folder for relative paths of `sources`."""

    def check(self) -> bool:
        """Whether the folder is this configuration's or nobody's; False: another run's, to be overwritten.

        Raises:
            UserError: a run with other options has this name, finished or not, or another process is running it.
        """
        _refuse_running(self.home)
        return self._is_ours()

    def began(self) -> bool:
        """Whether a run with these options has this name."""
        recorded = _recorded(self.home)
        return recorded is not None and recorded["config_hash"] == self.config_hash

    def _is_ours(self) -> bool:
        recorded = _recorded(self.home)
        if recorded is None and is_file(join(self.home, "metrics.json")):
            raise UserError(
                f"name = {name_of(self.home)!r}: an evaluation or a benchmark has this name; choose another --name"
            )
        if recorded is None:
            return True
        command = recorded.get("command", self.command)
        if recorded["config_hash"] != self.config_hash:
            difference = self._difference(recorded, command)
        elif changed := self._changed(recorded):
            difference = (
                f"this run is finished, and its rows have changed since ({', '.join(changed)}): it says nothing about "
                "the new ones; choose another --name, or --overwrite to delete that run"
            )
        else:
            return True
        if self.overwrite and command == self.command:
            return False
        raise UserError(f"name = {name_of(self.home)!r}: {difference}")

    def _changed(self, recorded: Mapping[str, Any]) -> list[str]:
        """Sources of a finished run that are there with another content. An unfinished run uses the new rows."""
        known = recorded.get("sources")
        last = "training.json" if self.command == "train" else "metrics.json"
        if not known or not is_file(join(self.home, last)):
            return []
        from ofmu_ray.data.prepare import source_contents

        now = source_contents(self.sources, self.root)
        return [f"data.{name}" for name, content in now.items() if known.get(name, content) != content]

    def note_sources(self, contents: Mapping[str, str]) -> None:
        """Record what was read (`PreparedData.sources`), while the folder is held."""
        record = {**(_recorded(self.home) or {}), "sources": dict(contents)}
        atomic_write(join(self.home, RECORD), json.dumps(record) + "\n")

    def _difference(self, recorded: Mapping[str, Any], command: str) -> str:
        if command != self.command:
            return f"an `ofmu {command}` has this name; choose another --name"
        before, now = (_determining(options) for options in (recorded.get("options") or {}, self.options))
        names = [name for name in before | now if before.get(name) != now.get(name)] if before else []
        shown = [f"{name} = {_short(before.get(name))}, now {_short(now.get(name))}" for name in names[:SHOWN]]
        shown += [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        what = "; ".join(shown) or f"hash {recorded['config_hash']}, now {self.config_hash}"
        remedy = "" if self.command == "sweep" else ", --overwrite to delete that run"
        return (
            f"a run with another configuration has this name ({what}); choose another --name{remedy}, or give the "
            "options it was started with"
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Claim and lock the folder for a block. A user's mistake before the first result gives the name back.

        Raises:
            UserError: as `check`.
        """
        empty = _is_empty(self.home)
        with locked(self.home):
            if not self._is_ours():
                _clear(self.home)
                empty = True
            fresh = not is_file(join(self.home, RECORD))
            if fresh:
                record = {"config_hash": self.config_hash, "command": self.command, "options": self.options}
                atomic_write(join(self.home, RECORD), json.dumps(record) + "\n")
            try:
                yield
            except StorageError:
                raise
            except UserError:
                if fresh and not _has_work(self.home):
                    if not empty:
                        _forget(self.home)
                    elif is_uri(self.home):
                        _clear(self.home)  # the lock is inside
                    else:
                        remove_folder(self.home)
                raise


def _has_work(home: str) -> bool:
    """Whether a run or sweep has something to resume from."""
    train = join(home, "train")
    if is_file(join(train, RAY_TRAIN_LIST)) or is_file(join(home, "training.json")):
        return True
    return not is_uri(home) and bool(local_checkpoints(Path(train)) or any(Path(home).glob("trials/*.json")))


def refuse_taken(home: PathLike) -> None:
    """Raise UserError if a run or a sweep has this folder, or a process is using it; for commands that claim none."""
    _refuse_running(home)
    recorded = _recorded(home)
    if recorded is not None:
        command = recorded.get("command", "unlearn")
        raise UserError(f"name = {name_of(home)!r}: an `ofmu {command}` has this name; choose another --name")


@contextmanager
def locked(home: PathLike) -> Iterator[None]:
    """Hold a run's folder against other processes, also those of other nodes if its file system has locks.

    The system releases the lock of a killed process; at a URI, `bucket_lock` does.

    Raises:
        UserError: another process has it.
        StorageError: at a URI, another process took it, as this one was silent for too long.
    """
    if is_uri(home):
        with marked(str(home), lambda name: _running(home, _parts(name))):
            yield
        return
    path = Path(home) / LOCK
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _try(handle):
            owner = _owner(handle)
            os.close(handle)
            raise _running(home, owner)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)  # its holder deleted it in between
    try:
        os.truncate(handle, 0)
        os.write(handle, json.dumps({"process": os.getpid(), "node": socket.gethostname()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _refuse_running(home: PathLike) -> None:
    owner = _holder(home)
    if owner is not None:
        raise _running(home, owner)


def is_running(home: PathLike) -> bool:
    """Whether another process runs this now."""
    return (holder(str(home)) if is_uri(home) else _holder(home)) is not None


def _holder(home: PathLike) -> dict[str, Any] | None:
    """Who holds a folder's lock, empty if it does not say; None: nobody. Creates nothing. Of a URI, `locked` tells."""
    if is_uri(home):
        return None
    try:
        handle = os.open(Path(home) / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _try(handle) else _owner(handle)
    finally:
        os.close(handle)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _owner(handle: int) -> dict[str, Any]:
    try:
        owner: dict[str, Any] = json.loads(os.pread(handle, 1000, 0) or b"{}")
    except ValueError:
        return {}
    return owner


def _parts(name: str) -> dict[str, Any]:
    node, process = name.split("/")[:2]
    return {"process": process, "node": node}


def _running(home: PathLike, owner: Mapping[str, Any]) -> UserError:
    who = f"process {owner['process']} on {owner['node']}" if owner else "another process"
    return UserError(
        f"name = {name_of(home)!r}: {who} is running it now; wait for it or stop it, or choose another --name"
    )


def _recorded(home: PathLike) -> dict[str, Any] | None:
    """run.json; for a run of an earlier version, the options from its manifest."""
    path, manifest = join(home, RECORD), join(home, "manifest.json")
    if not is_file(path):
        return None
    record: dict[str, Any] = json.loads(read_text(path))
    if "options" not in record and is_file(manifest):
        record["options"] = json.loads(read_text(manifest)).get("config")
    return record


def recorded_options(home: PathLike) -> dict[str, Any]:
    """The configuration that the run of this folder began with, nested; empty if it is not known."""
    options: dict[str, Any] = (_recorded(home) or {}).get("options") or {}
    return options


def _determining(options: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(dict(options))
    return {
        name: value
        for name, value in flat.items()
        if name not in (*ELASTIC, *WHERE_KEPT) and name.partition(".")[0] not in WHERE_KEPT
    }


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_empty(home: str) -> bool:
    """Whether there is nothing at a path, or an empty folder."""
    from pyarrow.fs import FileSelector

    filesystem, inside = locate(home)
    return not filesystem.get_file_info(FileSelector(inside, allow_not_found=True))


def _clear(home: str) -> None:
    """Delete what a run's folder contains, except for the lock that this process holds."""
    if is_uri(home):
        from pyarrow.fs import FileSelector, FileType

        filesystem, inside = locate(home)
        for one in filesystem.get_file_info(FileSelector(inside)):
            if one.type == FileType.Directory:
                remove_folder(join(home, one.base_name))
            elif not one.base_name.startswith(MARK):
                remove_file(join(home, one.base_name))
        return
    for path in Path(home).iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        elif path.name != LOCK:
            path.unlink()


def _forget(home: str) -> None:
    """Give up a folder that contained other files before."""
    remove_text(home)
    remove_file(join(home, RECORD))
