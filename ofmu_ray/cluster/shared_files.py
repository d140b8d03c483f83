"""Whether a node sees the driver's files: the storage, and everything that workers read by a local path.

Checked on every node before a run (`cluster/join.py`), and on the node of every worker whenever workers start:
otherwise a node that joined later might not find a checkpoint that the others have.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ofmu_ray.errors import UserError
from ofmu_ray.storage import PathLike, atomic_write, explained, is_uri, join, local_path, read_text, without_credentials
from ofmu_ray.storage.trouble import may_pass, refusal

MARK = ".driver"
"""File that the driver writes for the others to read; its content changes with each start."""

MOUNT = "mount one folder on all nodes (NFS, EFS, Filestore, Lustre) for --storage and local paths, or use URIs"
CREDENTIALS = (
    "give Ray on all nodes the same credentials and endpoint (environment, profile or role), and mount one folder for "
    "local paths"
)


@dataclass(frozen=True)
class SharedFiles:
    """What the driver sees."""

    storage: str
    """The user's name for it: for a run, its folder or URI."""
    mark: str
    """Path or URI of a small file in the storage."""
    content: str
    paths: tuple[tuple[str, str], ...] = ()
    """(option, path) of local files and folders."""

    @classmethod
    def of(cls, storage: PathLike, folder: PathLike, paths: Mapping[str, Iterable[str | None]]) -> SharedFiles:
        """Write the mark into `folder`, which is in the storage.

        `paths`: option -> files, folders, URIs or hub names. Only paths that exist on this node are checked.

        Raises:
            StorageError: no room, no rights or no answer.
        """
        local = [(option, str(local_path(p))) for option, ps in paths.items() for p in ps if p and not is_uri(p)]
        wanted = tuple((option, path) for option, path in local if os.path.exists(path))
        shared = cls(without_credentials(storage), join(folder, MARK), uuid.uuid4().hex, wanted)
        with explained(storage):
            atomic_write(shared.mark, shared.content)
        return shared

    def missing_here(self, *, retried: bool = False) -> list[str]:
        """Runs on a node: what it does not see, as text to follow its name.

        Raises:
            OSError: with `retried`, an error that may be temporary (a store that does not answer).
        """
        problems = [f"has no {path} ({option})" for option, path in self.paths if not os.path.exists(path)]
        try:
            if read_text(self.mark) != self.content:
                problems.append(unreadable("it sees another file"))
        except (OSError, UserError) as error:
            if retried and may_pass(error):
                raise
            problems.append(unreadable(why(error)))
        return problems

    def refuse(self, problems: Iterable[str], afterwards: str = "") -> None:
        """Raise UserError if there are problems ("node ADDRESS has no ..."). `afterwards`: the end of the remedy."""
        lines = list(dict.fromkeys(problems))
        if not lines:
            return
        remedy = CREDENTIALS if is_uri(self.storage) else MOUNT
        raise UserError(
            f"storage = {self.storage}, models and data must be the same on all nodes, but\n  "
            + "\n  ".join(lines)
            + f"\n{remedy}{afterwards}"
        )


def unreadable(reason: str) -> str:
    """A node's problem with the storage."""
    return f"cannot read or write the storage of the driver's node ({reason})"


def why(error: Exception) -> str:
    """A storage error in one sentence."""
    if isinstance(error, FileNotFoundError):
        return f"{MARK} is not there"
    return refusal(error) or " ".join(str(error).split()) or type(error).__name__
