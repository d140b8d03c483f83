"""Files that ship with the project: a generated corpus of fictitious people and two tiny models trained on it."""

from __future__ import annotations

from pathlib import Path

PREFIX = "builtin:"


def resolve_builtin(path: str) -> str:
    """Resolve `builtin:people/NAME` to a path in the installed package; return any other path unchanged."""
    if not path.startswith(PREFIX):
        return path
    return str(Path(__file__).resolve().parent / path.removeprefix(PREFIX))
