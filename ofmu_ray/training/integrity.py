"""Integrity of checkpoint folders: sizes and SHA-256 of their files, in `manifest.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ofmu_ray.storage.checksums import MANIFEST, Files, difference, fingerprints


def write_manifest(folder: Path, rank: int, world: int) -> None:
    """Rank 0 writes sizes and checksums of every rank's files into the folder. Collective."""
    own = fingerprints(folder)
    files: Files = {}
    for part in gathered(own, world):
        files |= part
    if rank == 0:
        (folder / MANIFEST).write_text(json.dumps({"workers": world, "files": files}, indent=1) + "\n")


def read_workers(folder: Path) -> int:
    """The number of workers that wrote a checkpoint."""
    return int(json.loads((folder / MANIFEST).read_text())["workers"])


def damage(folder: Path, rank: int, world: int) -> str | None:
    """How a checkpoint's folder is damaged; None: intact. The ranks share the work and agree. Collective."""
    reason = _damage(folder, rank, world)
    return next((each for each in gathered(reason, world) if each is not None), None)


def _damage(folder: Path, rank: int, world: int) -> str | None:
    try:
        files: Files = json.loads((folder / MANIFEST).read_text())["files"]
        for name in sorted(files)[rank::world]:
            reason = difference(folder / name, files[name])
            if reason is not None:
                return reason
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None


def gathered(value: Any, world: int) -> list[Any]:
    """All ranks' values, in rank order. Collective."""
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values
