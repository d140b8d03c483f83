"""The end of a run in MLflow, now or at the next start of the run: everything is in the run's home (its folder or URI)
meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ofmu_ray.config import TrackingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage import PathLike, atomic_write, is_file, join, local_file, read_text, remove_file, scratch
from ofmu_ray.tracking.connection import check_reachable, resolve_uri
from ofmu_ray.tracking.mlflow_run import RunHandle, Status, finish
from ofmu_ray.tracking.rounds import RoundLogger

UNDELIVERED = "undelivered.json"


def conclude(home: PathLike, handle: RunHandle, *, artifacts: Sequence[str], status: Status) -> bool:
    """Bring MLflow what <home> holds: missing rounds of the series, figures, cost, pages; and close the run.

    `artifacts`: names of files in <home>.

    Returns:
        False when MLflow did not take all of it: `undelivered.json` then says what `deliver_late` has to do.
    """
    summary = json.loads(read_text(join(home, "metrics.json")))
    training = json.loads(read_text(join(home, "training.json")))
    metrics = {name: figures for name, figures in summary.items() if name not in ("cost", "run")}
    done = not training["undelivered"] or _series(handle, training["series"])
    with scratch() as place:
        files = [local_file(join(home, name), place) for name in artifacts]
        done = done and finish(handle, metrics=metrics, cost=summary["cost"], artifacts=files, status=status)
    if done:
        remove_file(join(home, UNDELIVERED))
    else:  # without the address, which may hold a password
        left: dict[str, Any] = {"run_id": handle.run_id, "experiment_id": handle.experiment_id, "status": status}
        left["artifacts"] = list(artifacts)
        atomic_write(join(home, UNDELIVERED), json.dumps(left) + "\n")
    return done


def deliver_late(home: PathLike, config: TrackingConfig, storage: str) -> bool | None:
    """What `conclude` could not deliver when the run ended; None: there is nothing, False: still not."""
    path = join(home, UNDELIVERED)
    if not is_file(path):
        return None
    left = json.loads(read_text(path))
    uri = resolve_uri(config.uri, storage)
    try:
        check_reachable(uri)
    except UserError:
        return False
    handle = RunHandle(left["run_id"], uri, left["experiment_id"])
    return conclude(home, handle, artifacts=left["artifacts"], status=left["status"])


def _series(handle: RunHandle, series: Iterable[Mapping[str, float]]) -> bool:
    try:
        logger = RoundLogger(handle)
    except UserError:  # the database's file is gone
        return False
    for row in series:  # what MLflow has is left out
        logger.log(int(row["round"]), {name: value for name, value in row.items() if name != "round"})
    return logger.close()
