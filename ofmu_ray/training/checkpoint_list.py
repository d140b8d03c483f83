"""Repairs Ray Train's list of a run's checkpoints if a kill truncated it.

Ray Train 2.60 writes `checkpoint_manager_snapshot.json` in place: a driver killed during the write leaves an empty or
truncated file, and no later driver of the run would start. The list can be rebuilt from the checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

from ofmu_ray.internals.ray_private import SNAPSHOT_FILE, checkpoint_list
from ofmu_ray.storage import atomic_write
from ofmu_ray.storage.checksums import MANIFEST


def mend(folder: Path) -> None:
    """Rewrite the list of the checkpoints in Ray Train's `folder` if it exists but is not readable.

    It then contains those with a manifest, in the order of writing; their integrity is checked when one is restored
    (`checkpoint.newest`).
    """
    listed = folder / str(SNAPSHOT_FILE.get())
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
