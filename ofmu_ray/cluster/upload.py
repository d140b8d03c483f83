"""The upload of a submitted job: the working directory as one archive, packed by Ray's rules."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ofmu_ray.config.submit import SubmitConfig
from ofmu_ray.errors import UserError
from ofmu_ray.internals.ray_private import PACKAGE_LIMIT, pack


@dataclass(frozen=True)
class Package:
    """An archive ready for upload."""

    path: Path
    files: int
    megabytes: float
    """Size, in 10^6 bytes."""


def load_environment(config: SubmitConfig) -> dict[str, Any]:
    """The runtime environment of the job.

    Raises:
        UserError: no such file, or it contains no mapping.
    """
    path = Path(config.working_dir) / config.runtime_env
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not valid YAML"
        raise UserError(f"runtime_env = {str(path)!r}: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"runtime_env = {str(path)!r}: not a mapping (env_vars, excludes, ...)")
    return content


@contextmanager
def packed(config: SubmitConfig, environment: dict[str, Any], needed: Sequence[str]) -> Iterator[Package]:
    """An archive of the working directory without the files in `excludes` and .gitignore; deleted after the block.

    Raises:
        UserError: no such folder, larger than Ray accepts, or a file of `needed` is excluded.
    """
    root = Path(config.working_dir)
    if not root.is_dir():
        raise UserError(f"working_dir = {config.working_dir!r}: no such folder")
    excludes, limit = environment.pop("excludes", []), PACKAGE_LIMIT.get()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "working_dir.zip")
        gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"  # Ray's switch
        pack(root, path, gitignore=gitignore, excludes=excludes)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        size = path.stat().st_size
        if size >= limit:
            raise UserError(
                f"working_dir = {config.working_dir!r}: {size / 1e6:.0f} MB packed, but Ray accepts "
                f"{limit / 1e6:.0f} MB; add excludes in {config.runtime_env}, and put models and data on shared storage"
            )
        for name in needed:
            if name not in names:
                raise UserError(
                    f"config = {name!r}: excluded from the upload by .gitignore or by excludes in "
                    f"{config.runtime_env}; move it"
                )
        yield Package(path, len(names), size / 1e6)
