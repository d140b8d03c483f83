"""A small file system that is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[str], object]]:
    """Mount it at `place` during the block; yields a function that enlarges it. Skips the test if that needs root."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, f"size={size}", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield lambda size: subprocess.run([*mount, f"remount,size={size}", "tmpfs", str(place)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
