"""Files that ship with the project (a generated corpus of fictitious people, two tiny models fitted to it), and models
by path, URI or name."""

from __future__ import annotations

from pathlib import Path

PREFIX = "builtin:"


def resolve_builtin(path: str) -> str:
    """`builtin:people/NAME` as a path of the installed package; any other path as it is."""
    if not path.startswith(PREFIX):
        return path
    return str(Path(__file__).resolve().parent / path.removeprefix(PREFIX))


def model_source(path: str, option: str = "model.path") -> str:
    """A model's path as transformers takes it on this machine: a URI's content is fetched (once), a hub name stays.

    Raises:
        UserError: nothing whole lies at the URI; it names `option`.
    """
    from ofmu_ray.storage import fetched, is_uri

    return str(fetched(path, option)) if is_uri(path) else resolve_builtin(path)
