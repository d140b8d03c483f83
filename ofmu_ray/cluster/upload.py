"""What a submitted job takes along: the working directory as one archive, packed by Ray's own rules."""

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
    """An archive that is ready for the upload."""

    path: Path
    files: int
    megabytes: float
    """Size, in 10^6 bytes."""


def load_environment(config: SubmitConfig) -> dict[str, Any]:
    """The runtime environment of the job.

    Raises:
        UserError: no such file, or it does not hold a mapping.
    """
    path = Path(config.working_dir) / config.runtime_env
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no valid YAML"
        raise UserError(f"runtime_env = {str(path)!r}: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"runtime_env = {str(path)!r}: holds no mapping (env_vars, excludes, ...)")
    return content


@contextmanager
def packed(config: SubmitConfig, environment: dict[str, Any], needed: Sequence[str]) -> Iterator[Package]:
    """An archive of the working directory without what `excludes` and .gitignore name; gone after the block.

    Raises:
        UserError: no such folder, it is larger than Ray takes, or a file of `needed` is left out of it.
    """
    root = Path(config.working_dir)
    if not root.is_dir():
        raise UserError(f"working_dir = {config.working_dir!r}: no such folder")
    excludes, limit = environment.pop("excludes", []), PACKAGE_LIMIT.get()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "working_dir.zip")
        gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"  # Ray's own switch
        pack(root, path, gitignore=gitignore, excludes=excludes)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        size = path.stat().st_size
        if size >= limit:
            raise UserError(
                f"working_dir = {config.working_dir!r}: {size / 1e6:.0f} MB packed, but Ray takes "
                f"{limit / 1e6:.0f} MB; leave more out with excludes in {config.runtime_env}, and put "
                "models and data on shared storage"
            )
        for name in needed:
            if name not in names:
                raise UserError(
                    f"config = {name!r}: left out of the upload by .gitignore or by excludes in {config.runtime_env}; "
                    "move it"
                )
        yield Package(path, len(names), size / 1e6)
