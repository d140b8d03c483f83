"""Files that ship with the project: a generated corpus of fictitious people and two tiny models fitted to it."""

from __future__ import annotations

from pathlib import Path

PREFIX = "builtin:"


def resolve_builtin(path: str) -> str:
    """`builtin:people/NAME` as a path of the installed package; any other path as it is."""
    if not path.startswith(PREFIX):
        return path
    return str(Path(__file__).resolve().parent / path.removeprefix(PREFIX))
