"""The files through which a run on its way and a sweep's scheduler talk: `NNNN.json`, answered by a `.go` or `.stop`.

Worker and scheduler share a folder. Files outlive both processes: a resumed run knows its measurements and the
decisions, and the two may run on different nodes with shared storage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofmu_ray.storage import atomic_write


def publish(folder: str | Path, stage: int, content: Mapping[str, Any]) -> None:
    """Publish the result of a stage (metrics and cost), for the decision."""
    atomic_write(_path(folder, stage, "json"), json.dumps(content) + "\n")


def read_stage(folder: str | Path, stage: int) -> dict[str, Any] | None:
    """The published result of a stage, or None."""
    path = _path(folder, stage, "json")
    return json.loads(path.read_text()) if path.exists() else None


def decide(folder: str | Path, stage: int, *, go: bool) -> None:
    """Record the scheduler's decision after a stage."""
    atomic_write(_path(folder, stage, "go" if go else "stop"), "")


def decision(folder: str | Path, stage: int) -> bool | None:
    """The decision after a stage; None: not yet."""
    for word, go in (("stop", False), ("go", True)):
        if _path(folder, stage, word).exists():
            return go
    return None


def _path(folder: str | Path, stage: int, suffix: str) -> Path:
    return Path(folder) / f"{stage:04d}.{suffix}"
