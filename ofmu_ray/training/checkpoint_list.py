"""What checkpoints a run has; Ray Train's list of them, mended when a kill left it torn.

Ray Train 2.60 writes `checkpoint_manager_snapshot.json` in place: a driver that is killed within the write leaves an
empty or cut file, and no later driver of the run would start. What the list says is in the checkpoints themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

from ofmu_ray.storage import atomic_write
from ofmu_ray.storage.checksums import MANIFEST

RAY_TRAIN_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints, in its folder."""


def local_checkpoints(folder: Path) -> list[Path]:
    """Those of a run without Ray, oldest first; what a kill left half-written has another name."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and path.name[:6].isdigit())


def mend(folder: Path) -> None:
    """Write the list of the checkpoints in Ray Train's `folder` anew if it is there and cannot be read.

    Taken up are those that have a manifest, in the order in which it was written; whether they are whole is checked
    when one is restored (`checkpoint.newest`).
    """
    from ofmu_ray.internals.ray_private import checkpoint_list

    listed = folder / RAY_TRAIN_LIST
    if not listed.exists() or _is_json(listed.read_text()):
        return
    manifests = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)
    atomic_write(listed, checkpoint_list([path.parent.name for path in manifests]))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
