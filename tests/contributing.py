"""The code that CONTRIBUTING.md shows, for the tests that run it."""

from __future__ import annotations

import itertools
from pathlib import Path

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text()


def added_to(path: str) -> str:
    """The lines that a diff adds to a file."""
    _, _, rest = TEXT.partition(f"\n+++ {path}")
    lines = itertools.takewhile(lambda line: not line.startswith(("+++", "```")), rest.splitlines()[1:])
    return "".join(line[1:] + "\n" for line in lines if line.startswith("+"))
