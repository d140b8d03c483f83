"""Completes a run in MLflow, at its end or at its next start; until then everything is in the run's home (folder or
URI)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ofmu_ray.config import TrackingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage import PathLike, atomic_write, is_file, join, local_file, read_text, remove_file, scratch
from ofmu_ray.tracking.connection import check_reachable, resolve_uri
from ofmu_ray.tracking.description import describe
from ofmu_ray.tracking.mlflow_run import RunHandle, Status, finish
from ofmu_ray.tracking.rounds import RoundLogger

UNDELIVERED = "undelivered.json"


def conclude(home: PathLike, handle: RunHandle, *, artifacts: Sequence[str], status: Status) -> bool:
    """Deliver the content of <home> to MLflow (missing rounds of the series, metrics, cost, pages) and close the run.

    `artifacts`: names of files in <home>.

    Returns:
        False if MLflow did not accept everything: `undelivered.json` then lists the rest for `deliver_late`.
    """
    summary = json.loads(read_text(join(home, "metrics.json")))
    training = json.loads(read_text(join(home, "training.json")))
    metrics = {name: values for name, values in summary.items() if name not in ("cost", "run")}
    manifest = json.loads(read_text(join(home, "manifest.json")))
    described = partial(describe, summary=summary, manifest=manifest)
    done = not training["undelivered"] or _series(handle, training["series"])
    with scratch() as place:
        files = [local_file(join(home, name), place) for name in artifacts]
        done = done and finish(
            handle, metrics=metrics, cost=summary["cost"], described=described, artifacts=files, status=status
        )
    if done:
        remove_file(join(home, UNDELIVERED))
    else:  # without the address, which may contain a password
        left: dict[str, Any] = {"run_id": handle.run_id, "experiment_id": handle.experiment_id, "status": status}
        left["artifacts"] = list(artifacts)
        atomic_write(join(home, UNDELIVERED), json.dumps(left) + "\n")
    return done


def deliver_late(home: PathLike, config: TrackingConfig, storage: str) -> bool | None:
    """Deliver what `conclude` could not. None: nothing to deliver; False: failed again."""
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
    except UserError:  # the database file is gone
        return False
    for row in series:  # rounds that MLflow has are skipped
        logger.log(int(row["round"]), {name: value for name, value in row.items() if name != "round"})
    return logger.close()
