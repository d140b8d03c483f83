"""What a local file contains: a digest of its bytes, and where in it to split lines. Read once, known again by size and
time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import lru_cache

from ofmu_ray.storage import atomic_write
from ofmu_ray.storage.local import node_folder

RANGE_BYTES = 64 * 2**20
"""A file of lines is split about here."""
SETTLED_SECONDS = 2.0
"""A file that changed so recently may change again within the same tick of its clock, so it is not remembered."""
_BLOCK = 2**20
_VERSION = 1


@dataclass(frozen=True)
class Content:
    """A file as it was read."""

    sha256: str
    ranges: tuple[tuple[int, int], ...]
    """(first byte, number of its line from 1) of each range; the first is (0, 1)."""


def content(path: str) -> Content:
    """The content of a local file. Files of more than a range are remembered on this machine, others by this process.

    Raises OSError.
    """
    status = os.stat(path)
    state = os.path.abspath(path), status.st_ino, status.st_size, status.st_mtime_ns
    if time.time_ns() - status.st_mtime_ns < SETTLED_SECONDS * 1e9:
        return _read(path)
    return _known(state)


@lru_cache(maxsize=4096)
def _known(state: tuple[str, int, int, int]) -> Content:
    path, _, size, _ = state
    if size <= RANGE_BYTES:
        return _read(path)
    key = hashlib.sha256(json.dumps([_VERSION, RANGE_BYTES, *state]).encode()).hexdigest()[:32]
    remembered = node_folder() / "files" / f"{key}.json"
    try:
        entry = json.loads(remembered.read_text())
        return Content(entry["sha256"], tuple((start, line) for start, line in entry["ranges"]))
    except (OSError, ValueError, KeyError, TypeError):
        found = _read(path)
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(remembered, json.dumps(asdict(found)).encode())
    except Exception:  # a full disk or no home: the file is read again next time
        pass
    return found


def _read(path: str) -> Content:
    """One pass: digest, and the first line that starts after each multiple of RANGE_BYTES."""
    digest = hashlib.sha256()
    ranges, place, line, due = [(0, 1)], 0, 1, RANGE_BYTES
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            while (at := block.find(b"\n", max(0, due - 1 - place))) >= 0:
                start = place + at + 1
                ranges.append((start, line + block.count(b"\n", 0, at + 1)))
                due = start + RANGE_BYTES
            line += block.count(b"\n")
            place += len(block)
    ranges = [each for each in ranges if each[0] < max(place, 1)]
    return Content(digest.hexdigest(), tuple(ranges))
