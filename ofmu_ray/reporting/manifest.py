"""What determined a run, with digests: enough to decide whether two runs were the same."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ofmu_ray
from ofmu_ray.storage import PathLike, contents, fetched, is_uri

PACKAGES = (
    "torch", "ray", "deepspeed", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "datasets",
    "mlflow", "pyarrow", "numpy", "scipy", "rouge-score",
)  # fmt: skip
SUFFIXES = (".safetensors", ".safetensors.index.json")
"""Of weights."""


def build_manifest(
    *,
    name: str,
    config: Mapping[str, Any],
    config_hash: str,
    seed: int,
    data: Mapping[str, Any],
    models: Mapping[str, PathLike | None],
    command: str,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a run, JSON-able and without any row's text.

    Args:
        data: the data report (hashes, counts, ids).
        models: role -> model directory or URI. The manifest has the digests of its safetensors files, null for a role
            without a model.
        command: how the run was started.
        extra: more top-level entries.
    """
    return {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "config_hash": config_hash,
        "seed": seed,
        "code": code_version(),
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "models": {role: model_hashes(path) if path is not None else None for role, path in models.items()},
        "data": dict(data),
        "config": dict(config),
        **(extra or {}),
    }


def code_version() -> dict[str, Any]:
    """Version of the package, and the git commit when it runs from its own checkout (null otherwise).

    ``modified`` says that tracked files differ from the commit.
    """
    folder = Path(ofmu_ray.__file__).parent
    commit = modified = None
    # an installed copy may be inside another project's checkout, which does not track it
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(folder, "rev-parse", "HEAD")
        status = _git(folder, "status", "--porcelain", "--untracked-files=no")
        modified = None if status is None else bool(status)
    return {"version": ofmu_ray.__version__, "commit": commit, "modified": modified}


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Installed version of each package; null: not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def model_hashes(folder: PathLike) -> dict[str, str] | None:
    """SHA-256 of each weights file of a model directory, by file name; None if it has none.

    For a URI, the digests come from its manifest, or from a fetched copy if it has none.
    """
    if is_uri(folder):
        listed = {name: file.get("sha256", "") for name, file in contents(folder).items() if name.endswith(SUFFIXES)}
        if listed and all(listed.values()):
            return listed
    root = fetched(folder, "model")
    files = sorted(path for suffix in SUFFIXES for path in root.glob(f"*{suffix}"))
    if not files:
        return None
    hashes = {}
    for path in files:
        with path.open("rb") as stream:
            hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
