"""Manifest of a folder: sizes and SHA-256 of its files, in a `manifest.json` that is written last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

Files = dict[str, dict[str, Any]]
"""File name, with / in subfolders -> {"bytes", "sha256"}."""


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": sha256(stream)}


def sha256(stream: Any) -> str:
    """Hex digest of the rest of a binary stream (Python's or pyarrow's)."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprints(folder: Path) -> Files:
    """All files of a folder, including subfolders."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in paths}


def difference(path: Path, written: Mapping[str, Any]) -> str | None:
    """How a file differs from what was written; None: identical."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != written["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {written['bytes']}"
    if fingerprint(path)["sha256"] != written["sha256"]:
        return f"{path.name} does not match its checksum"
    return None
