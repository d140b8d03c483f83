"""The end of a run in MLflow, now or at the next start of the run: everything is in the run's folder meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ofmu_ray.config import TrackingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage import atomic_write
from ofmu_ray.tracking.connection import check_reachable, resolve_uri
from ofmu_ray.tracking.rounds import RoundLogger
from ofmu_ray.tracking.run import RunHandle, Status, finish

UNDELIVERED = "undelivered.json"


def conclude(folder: Path, handle: RunHandle, *, artifacts: Iterable[Path], status: Status) -> bool:
    """Bring MLflow what <folder> holds: missing rounds of the series, figures, cost, pages; and close the run.

    Returns:
        False when MLflow did not take all of it: `undelivered.json` then says what `deliver_late` has to do.
    """
    files = list(artifacts)
    summary = json.loads((folder / "metrics.json").read_text())
    training = json.loads((folder / "training.json").read_text())
    metrics = {name: figures for name, figures in summary.items() if name not in ("cost", "run")}
    done = not training["undelivered"] or _series(handle, training["series"])
    done = done and finish(handle, metrics=metrics, cost=summary["cost"], artifacts=files, status=status)
    if done:
        (folder / UNDELIVERED).unlink(missing_ok=True)
    else:  # without the address, which may hold a password
        names = [path.name for path in files]
        left = {"run_id": handle.run_id, "experiment_id": handle.experiment_id, "status": status, "artifacts": names}
        atomic_write(folder / UNDELIVERED, json.dumps(left) + "\n")
    return done


def deliver_late(folder: Path, config: TrackingConfig, storage: str) -> bool | None:
    """What `conclude` could not deliver when the run ended; None: there is nothing, False: still not."""
    path = folder / UNDELIVERED
    if not path.exists():
        return None
    left: dict[str, Any] = json.loads(path.read_text())
    uri = resolve_uri(config.uri, storage)
    try:
        check_reachable(uri)
    except UserError:
        return False
    handle = RunHandle(left["run_id"], uri, left["experiment_id"])
    return conclude(folder, handle, artifacts=[folder / name for name in left["artifacts"]], status=left["status"])


def _series(handle: RunHandle, series: Iterable[Mapping[str, float]]) -> bool:
    try:
        logger = RoundLogger(handle)
    except UserError:  # the database's file is gone
        return False
    for row in series:  # what MLflow has is left out
        logger.log(int(row["round"]), {name: value for name, value in row.items() if name != "round"})
    return logger.close()
