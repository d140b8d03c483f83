"""Options of `ofmu submit`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ofmu_ray.config.ranges import require


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """`ofmu submit COMMAND`: run another command as a Ray job. Options unknown to submit go to COMMAND."""

    address: str = "http://127.0.0.1:8265"
    """URL of the cluster's dashboard."""
    follow: bool = True
    """Print the job's output until it ends, and exit with its status; --no-follow returns after the upload."""
    working_dir: str = "."
    """Folder to upload, in which the command runs: this repository, or a copy with your files."""
    runtime_env: str = "runtime_env.yaml"
    """Ray runtime environment: variables, and excludes for the upload. Relative to the working directory."""
    attach: str | None = None
    """Follow the job with this submission id; no COMMAND."""
    status: str | None = None
    """Print the status of the job with this submission id; no COMMAND."""
    stop: str | None = None
    """Stop the job with this submission id and wait for its end; no COMMAND."""

    def __post_init__(self) -> None:
        url = re.fullmatch(r"https?://[^\s/]+(/\S*)?", self.address)
        require(url is not None, "address", self.address, "the dashboard's URL, such as http://127.0.0.1:8265")
        given = [name for name in ("attach", "status", "stop") if getattr(self, name) is not None]
        require(len(given) < 2, " and ".join(given), "given", "given one at a time")
