"""The MLflow run of a run: the driver starts or finds it and finishes it; rank 0 writes to it in between."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ofmu_ray.config import ELASTIC, WHERE_KEPT, TrackingConfig, flatten
from ofmu_ray.errors import UserError
from ofmu_ray.storage import PathLike, atomic_write, is_file, is_uri, join, local_path, read_text
from ofmu_ray.tracking import connection
from ofmu_ray.tracking.description import EXPERIMENT_KIND

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_NAME_TAG = "ofmu.run_name"
RECORD_TAG = "ofmu.record"
RECORD = "mlflow.json"
"""File of a run's folder that keeps the id of its MLflow run."""
LONGEST_VALUE = 6000  # MLflow's limit of a parameter's value, in characters
PARAMETERS_PER_CALL = 100  # MLflow's limit
METRICS_PER_CALL = 1000  # MLflow's limit
ARTIFACT_SUFFIXES = frozenset({".html", ".json", ".md", ".svg", ".yaml"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHandle:
    """What a worker needs to write to the run; plain strings, so it fits into a train loop's config."""

    run_id: str
    uri: str
    experiment_id: str
    tensorboard: str | None = None
    """Absolute folder of the run's event files; None: none."""


def start(
    config: TrackingConfig,
    storage: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    *,
    record: PathLike | None = None,
) -> RunHandle:
    """Create the run with its parameters, or resume the one that `record` names.

    The driver calls it once, before any worker starts: concurrent first use of a fresh SQLite file fails, so this
    creates the database and the experiment, under a lock shared by all drivers on this machine.

    Args:
        params: the complete configuration, nested or flat; values are logged as JSON (strings unchanged), cut to
            6000 characters.
        tags: additional tags, e.g. the code version; overwritten on resumption.
        record: file that keeps the run's id, in the folder of what is tracked: a start with the same parameters
            (storage and reporting may differ) resumes that run. Equal names alone are different runs. None: always a
            new run.

    Raises:
        UserError: MLflow is not reachable within seconds or does not respond in 30 seconds, the experiment was
            deleted, or TensorBoard is not installed.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if config.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tracking.tensorboard: it is not installed: pip install 'ofmu-ray[tensorboard]', or null")
    uri = connection.resolve_uri(config.uri, storage)
    connection.check_reachable(uri)
    values = {name: _text(value) for name, value in flatten(dict(params)).items()}
    own_tags = {**(tags or {}), RUN_NAME_TAG: run_name}
    try:
        with connection.impatient(), connection.creation_lock(uri):
            client = connection.client(uri)  # creates the tables of a fresh database
            experiment_id = _experiment(client, config.experiment, uri, storage)
        run = None if record is None else _recorded(client, experiment_id, record, values)
        known = run is not None
        if record is not None and not known:
            own_tags[RECORD_TAG] = hashlib.sha256(f"{record}\0{_digest(values)}".encode()).hexdigest()[:32]
            run = _unrecorded(client, experiment_id, own_tags[RECORD_TAG])
        if run is None:
            run = client.create_run(experiment_id, run_name=run_name, tags=own_tags)
        if record is not None and not known:
            entry = {"run_id": run.info.run_id, "parameters": _digest(values)}
            atomic_write(record, json.dumps(entry) + "\n")
        if known:
            client.update_run(run.info.run_id, status="RUNNING")
            for key, value in own_tags.items():
                client.set_tag(run.info.run_id, key, value)
        _log_params(client, run, values)
    except (MlflowException, SQLAlchemyError) as error:
        raise connection.unreachable(uri, _first_line(error)) from None
    events = config.tensorboard and str(Path(config.tensorboard, run_name).absolute())
    return RunHandle(run.info.run_id, uri, experiment_id, events)


def finish(
    handle: RunHandle,
    *,
    metrics: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    described: Callable[[Any, str], None] | None = None,
    artifacts: Iterable[str | Path] = (),
    tables: Iterable[str | Path] = (),
    status: Status = "FINISHED",
) -> bool:
    """Log the final metrics and files, and close the run.

    Args:
        metrics: ``{"before": {name: {"value", ...}}, "after": ..., "retrained": ... | None}`` becomes
            ``after/forget_quality`` and so on, without intervals; absent metrics are skipped.
        cost: nested numbers, logged as ``cost/gradient_passes/forget`` and so on.
        described: called with the client and the run's id, to add more.
        artifacts: pages and JSON files; evaluation rows contain text and are refused.
        tables: Parquet files without any text.

    Returns:
        False if MLflow is no longer reachable: logs a warning, and the run does not fail, since everything is in its
        folder.

    Raises:
        AssertionError: an artifact is not a page, plot or JSON file.
    """
    files = [Path(path) for path in artifacts]
    for file in files:
        assert file.suffix in ARTIFACT_SUFFIXES, (
            f"{file.name} is not a page, plot or JSON file, so it may contain text of rows"
        )
    files += map(Path, tables)
    values = {**_values(metrics or {}), **_numbers(cost or {}, "cost/")}
    client = connection.client(handle.uri)
    try:
        with connection.impatient(retries=2):
            _log_values(client, handle.run_id, values)
            if described is not None:
                described(client, handle.run_id)
            for file in files:
                client.log_artifact(handle.run_id, str(file))
            client.set_terminated(handle.run_id, status=status)
    except Exception as error:  # MLflow's stores raise their own, sqlalchemy's and requests' errors
        _log.warning("MLflow run %s was not closed (%s); all results are in the run's folder.",
                     handle.run_id, _first_line(error))  # fmt: skip
        return False
    return True


@contextmanager
def system_metrics(handle: RunHandle, *, enabled: bool = True, interval_seconds: float = 5.0) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPU use of this machine as ``system/...`` during the block."""
    if not enabled:
        yield
        return
    connection.client(handle.uri)  # silences MLflow's start and stop lines
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        handle.run_id, sampling_interval=interval_seconds, resume_logging=True, tracking_uri=handle.uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def open_command(handle: RunHandle) -> str:
    """How to open the run: its address on a server, or a command that serves a local database.

    The command's address is on a second line, as not every shell takes a comment behind a command.
    """
    # without the query, MLflow 3 shows a run among the evaluations of a language model
    page = f"#/experiments/{handle.experiment_id}/runs/{handle.run_id}?workflowType=machine_learning"
    if handle.uri.startswith(("http://", "https://")):
        return f"{connection.without_password(handle.uri).rstrip('/')}/{page}"
    shown = connection.without_password(handle.uri)
    # of this environment, whatever the shell's PATH is and wherever the packages' scripts are
    command = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", shown])
    return f"{command}\nhttp://127.0.0.1:5000/{page}"


# ------------------------------------------------------------------------------------------------------- creation


def _experiment(client: Any, name: str, uri: str, storage: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server chooses the location; a database would use the working directory.
        on_server = uri.startswith(("http", "databricks"))
        try:
            place = None if on_server else _artifact_location(uri, storage)
            return str(client.create_experiment(name, place, tags=dict([EXPERIMENT_KIND])))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another driver was first
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment = {name!r} was deleted in MLflow: choose another name, or restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return str(experiment.experiment_id)


def _artifact_location(uri: str, storage: str) -> str:
    """In the storage, or next to the SQLite file if the storage is a URI (MLflow would need boto3 and others)."""
    file = connection.sqlite_file(uri)
    if not is_uri(storage):
        return (local_path(storage) / "mlartifacts").as_uri()
    return (file.parent / "mlartifacts").as_uri() if file is not None else join(storage, "mlartifacts")


def recorded_run(record: PathLike) -> str | None:
    """The id of the run that a file keeps; None: no such file."""
    return str(json.loads(read_text(record))["run_id"]) if is_file(record) else None


def _recorded(client: Any, experiment_id: str, record: PathLike, values: Mapping[str, str]) -> Any | None:
    """The recorded run, if the parameters that determine it are the same and this experiment has it."""
    from mlflow.exceptions import MlflowException

    if not is_file(record):
        return None
    entry = json.loads(read_text(record))
    if entry["parameters"] != _digest(values):
        return None
    try:
        run = client.get_run(entry["run_id"])
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another database
            return None
        raise
    there = run.info.lifecycle_stage == "active" and str(run.info.experiment_id) == experiment_id
    return run if there else None


def _unrecorded(client: Any, experiment_id: str, tag: str) -> Any | None:
    """A run that a process began and was killed before it could record the id."""
    begun = f"tags.`{RECORD_TAG}` = '{tag}' and attributes.status = 'RUNNING'"
    return next((run for run in client.search_runs([experiment_id], begun) if not run.data.metrics), None)


def _digest(values: Mapping[str, str]) -> str:
    """Hash of the parameters that determine a run."""
    kept = {
        name: value
        for name, value in values.items()
        if name.partition(".")[0] not in WHERE_KEPT and name not in ELASTIC
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def _log_params(client: Any, run: Any, values: Mapping[str, str]) -> None:
    """Log missing parameters; MLflow refuses to change existing ones."""
    from mlflow.entities import Param

    missing = [Param(name, value) for name, value in values.items() if name not in run.data.params]
    for begin in range(0, len(missing), PARAMETERS_PER_CALL):
        client.log_batch(run.info.run_id, params=missing[begin : begin + PARAMETERS_PER_CALL])


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


# --------------------------------------------------------------------------------------------------- final values


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for model, named in metrics.items():
        for name, metric in (named or {}).items():
            if isinstance(metric, Mapping) and metric.get("value") is not None:
                values[f"{model}/{name}"] = float(metric["value"])
    return values


def _numbers(nested: Mapping[str, Any], prefix: str) -> dict[str, float]:
    flat = flatten(dict(nested))
    return {
        prefix + name.replace(".", "/"): float(value)
        for name, value in flat.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _log_values(client: Any, run_id: str, values: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    logged = [Metric(name, value, now, 0) for name, value in values.items()]
    for begin in range(0, len(logged), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=logged[begin : begin + METRICS_PER_CALL])
