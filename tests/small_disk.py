"""A file system of its own that is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Callable[[str], object]]:
    """Mounted at `place` while the block runs; yields how it is made larger. Skips the test where that needs root."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, f"size={size}", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield lambda size: subprocess.run([*mount, f"remount,size={size}", "tmpfs", str(place)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
