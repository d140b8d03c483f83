"""What checkpoints a run has; repairs Ray Train's list of them if a kill truncated it.

Ray Train 2.60 writes `checkpoint_manager_snapshot.json` in place: a driver killed during the write leaves an empty or
truncated file, and no later driver of the run would start. The list can be rebuilt from the checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

from ofmu_ray.storage import atomic_write
from ofmu_ray.storage.checksums import MANIFEST

RAY_TRAIN_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints, in its folder."""


def local_checkpoints(folder: Path) -> list[Path]:
    """Those of a run without Ray, oldest first; those left incomplete by a kill have other names."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and path.name[:6].isdigit())


def mend(folder: Path) -> None:
    """Rewrite the list of the checkpoints in Ray Train's `folder` if it exists but is not readable.

    It then contains those with a manifest, in the order of writing; their integrity is checked when one is restored
    (`checkpoint.newest`).
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
