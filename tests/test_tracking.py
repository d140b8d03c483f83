"""MLflow: runs are found again, series have no duplicates, and an unreachable server is reported at once."""

import importlib.util
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_server import mlflow_server

from ofmu_ray.config import TrackingConfig, TrainConfig, UnlearnConfig, apply_overrides, to_dict
from ofmu_ray.errors import UserError
from ofmu_ray.runs.run import run
from ofmu_ray.tracking import (
    RECORD,
    RoundLogger,
    RunHandle,
    conclude,
    deliver_late,
    finish,
    open_command,
    recorded_run,
    start,
    system_metrics,
)
from ofmu_ray.tracking.description import describe

CONFIG = TrackingConfig()
METRICS = {
    "before": {"forget_quality": {"value": 0.001, "low": None, "high": None, "n": 48}},
    "after": {
        "forget_quality": {"value": 0.42, "low": 0.1, "high": 0.9, "n": 48},
        "model_utility": {"value": None, "reason": "evaluation.sets.world_facts is null"},
    },
    "retrained": None,
}
COST = {"gradient_passes": {"forget": 70, "retain": 30}, "seconds": {"training": 12.5}, "updates": 60}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One storage for the module, because creating its database takes seconds; tests use different run names."""
    return str(tmp_path_factory.mktemp("storage"))


def _client(handle: RunHandle) -> MlflowClient:
    return MlflowClient(tracking_uri=handle.uri)


def _steps(handle: RunHandle, name: str) -> list[int]:
    return sorted(metric.step for metric in _client(handle).get_metric_history(handle.run_id, name))


@pytest.mark.slow
def test_default_database_and_artifacts_lie_under_storage(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handle = start(CONFIG, storage, "paths", {})
    assert handle.uri == f"sqlite:///{storage}/mlflow.db"
    page = tmp_path / "report.html"
    page.write_text("<html></html>")
    assert finish(handle, artifacts=[page])
    assert list((Path(storage) / "mlartifacts").rglob("report.html"))
    assert list(tmp_path.iterdir()) == [page]
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ


@pytest.mark.slow
def test_the_complete_configuration_is_logged_as_parameters(storage: str) -> None:
    config = to_dict(apply_overrides(UnlearnConfig(seed=7), {"ofmu.inner.lr": 1e-5}))
    handle = start(CONFIG, storage, "parameters", config, {"version": "1"})
    run = _client(handle).get_run(handle.run_id)
    assert run.data.params["seed"] == "7"
    assert run.data.params["ofmu.inner.lr"] == "1e-05"
    assert run.data.params["ofmu.decorrelate_every"] == "null"
    assert len(run.data.params) > 60
    assert run.data.tags["ofmu.run_name"] == "parameters"
    assert run.data.tags["version"] == "1"


@pytest.mark.slow
def test_long_values_and_many_parameters_fit_mlflow(storage: str) -> None:
    handle = start(CONFIG, storage, "limits", {"long": "x" * 7000, **{f"p{i}": i for i in range(250)}})
    params = _client(handle).get_run(handle.run_id).data.params
    assert len(params) == 251
    assert len(params["long"]) == 6000


def test_resumption_finds_the_run_and_replayed_rounds_appear_once(storage: str, tmp_path: Path) -> None:
    name, record = "it's resumed", tmp_path / RECORD
    first = start(CONFIG, storage, name, {"seed": 0, "storage": "a"}, record=record)
    with RoundLogger(first) as logger:
        for step in range(8):
            logger.log(step, {"loss/forget": float(step), "rho": 0.1})
        logger.log(8, {"loss/forget": 8.0})  # killed between two series of one round
    assert finish(first, status="KILLED")
    second = start(CONFIG, storage, name, {"seed": 0, "storage": "b"}, record=record)
    assert second == first
    assert _client(second).get_run(second.run_id).info.status == "RUNNING"
    with RoundLogger(second) as logger:
        for step in range(5, 12):
            logger.log(step, {"loss/forget": float(step), "rho": 0.1})
            logger.log(step, {"rho": 0.2})
    assert _steps(second, "loss/forget") == list(range(12))
    assert _steps(second, "rho") == list(range(12))
    assert finish(second)
    assert _client(second).get_run(second.run_id).info.status == "FINISHED"


def test_equal_names_alone_are_different_runs(storage: str, tmp_path: Path) -> None:
    """Two sweeps of one name have two runs; one folder has one, as long as its parameters stay."""
    record = tmp_path / "sub" / RECORD
    first = start(CONFIG, storage, "same name", {"seed": 0}, record=record)
    assert recorded_run(record) == first.run_id
    assert start(CONFIG, storage, "same name", {"seed": 0}).run_id != first.run_id
    assert start(CONFIG, storage, "same name", {"seed": 0}, record=tmp_path / RECORD).run_id != first.run_id
    assert start(CONFIG, storage, "renamed", {"seed": 0}, record=record) == first
    assert start(CONFIG, storage, "same name", {"seed": 1}, record=record).run_id != first.run_id
    record.write_text(json.dumps({**json.loads(record.read_text()), "run_id": "0" * 32}))  # another database
    assert start(CONFIG, storage, "same name", {"seed": 1}, record=record).run_id not in ("0" * 32, first.run_id)


def test_a_run_whose_driver_was_killed_before_it_recorded_the_id_is_found(storage: str, tmp_path: Path) -> None:
    record = tmp_path / RECORD
    first = start(CONFIG, storage, "r", {"seed": 0}, record=record)
    record.unlink()
    assert start(CONFIG, storage, "r", {"seed": 0}, record=record) == first
    assert recorded_run(record) == first.run_id
    with RoundLogger(first) as logger:
        logger.log(1, {"rho": 0.1})
    record.unlink()  # --overwrite: the run's folder is gone, and its series are another run's
    assert start(CONFIG, storage, "r", {"seed": 0}, record=record) != first


def test_series_are_buffered_and_flushed_by_count(storage: str) -> None:
    handle = start(CONFIG, storage, "buffer", {})
    logger = RoundLogger(handle, flush_rounds=3, flush_seconds=3600)
    logger.log(0, {"a": 1.0})
    logger.log(1, {"a": 1.0})
    assert _steps(handle, "a") == []
    logger.log(2, {"a": 1.0})
    assert _steps(handle, "a") == [0, 1, 2]
    logger.log(3, {"a": float("nan")})
    logger.close()
    assert _steps(handle, "a") == [0, 1, 2, 3]


def test_more_points_than_one_call_takes(storage: str) -> None:
    handle = start(CONFIG, storage, "many", {})
    with RoundLogger(handle, flush_rounds=10_000, flush_seconds=3600) as logger:
        for step in range(300):
            logger.log(step, {f"s{i}": 1.0 for i in range(8)})
    assert _steps(handle, "s7") == list(range(300))


def test_final_metrics_and_cost(storage: str) -> None:
    handle = start(CONFIG, storage, "figures", {})
    assert finish(handle, metrics=METRICS, cost=COST)
    assert _client(handle).get_run(handle.run_id).data.metrics == {
        "before/forget_quality": 0.001,
        "after/forget_quality": 0.42,
        "cost/gradient_passes/forget": 70,
        "cost/gradient_passes/retain": 30,
        "cost/seconds/training": 12.5,
        "cost/updates": 60,
    }


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no username")])
def test_a_user_without_a_name_does_not_keep_a_run_open(
    storage: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Containers run as any number."""
    manifest = {"name": "n", "command": "c", "code": {"commit": None}, "data": {"streams": {}}, "models": {}}
    run = {"method": "ofmu", "rounds": 1, "status": "finished", "message": "", "model": "m"}
    handle = start(CONFIG, storage, "nameless", {})
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(error))
    described = partial(describe, summary={"run": run}, manifest=manifest)
    assert finish(handle, described=described)
    assert _client(handle).get_run(handle.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_fit_has_its_source_its_data_and_its_model(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}."}) + "\n" for n in range(8)))
    options = {"name": "fit", "storage": str(tmp_path / "runs"), "epochs": 1, "tokenizer": "builtin:people/target"}
    options |= {f"training.{name}": value for name, value in {"engine": "torch", "batch_size": 4}.items()}
    options |= {f"scratch.{name}": 8 for name in ("hidden_size", "intermediate_size")}
    options |= {f"scratch.{name}": 1 for name in ("layers", "heads", "kv_heads")}
    config = apply_overrides(TrainConfig(), options | {"scratch.vocab_size": 1024, "data.train.path": str(rows)})
    outcome = run(config, command=["ofmu", "train", "--config", "my own.yaml"])
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    (found,) = client.search_runs(["1"])
    assert found.data.tags["ofmu.command"] == "ofmu train --config 'my own.yaml'"
    assert found.data.tags["mlflow.source.name"] == "ofmu train"
    assert found.data.tags["mlflow.note.content"] == "fitted for 2 steps of 4 rows: finished"
    (data_set,) = found.inputs.dataset_inputs
    assert str(rows) in data_set.dataset.source
    (logged,) = found.outputs.model_outputs
    assert client.get_logged_model(logged.model_id).tags["ofmu.path"] == str(outcome.model)


def test_evaluation_rows_are_refused_as_artifacts(storage: str, tmp_path: Path) -> None:
    handle = start(CONFIG, storage, "rows", {})
    rows = tmp_path / "rows.parquet"
    rows.write_bytes(b"PAR1")
    with pytest.raises(AssertionError, match=r"rows\.parquet"):
        finish(handle, artifacts=[rows])
    assert _client(handle).list_artifacts(handle.run_id) == []


def test_system_metrics_of_the_driver(storage: str) -> None:
    handle = start(CONFIG, storage, "system", {})
    name = "system/system_memory_usage_percentage"
    with system_metrics(handle, interval_seconds=0.1):
        for _ in range(100):
            if name in _client(handle).get_run(handle.run_id).data.metrics:
                break
            time.sleep(0.1)
    assert name in _client(handle).get_run(handle.run_id).data.metrics


def test_training_outlives_its_tracking(tmp_path: Path, storage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A server that disappears costs a warning; the points are delivered once it is back."""
    handle = start(CONFIG, storage, "outage", {})
    database = Path(storage) / "mlflow.db"
    logger = RoundLogger(handle, flush_rounds=1, flush_seconds=3600)
    working, logger._client = logger._client, MlflowClient(tracking_uri=f"http://127.0.0.1:{_free_port()}")
    logger.log(0, {"a": 1.0})
    logger.log(1, {"a": 1.0})
    assert [record.message for record in caplog.records if "series" in record.message] == [
        "MLflow does not accept the series (MlflowException); retrying."
    ]
    logger._client = working
    logger.close()
    assert database.is_file()
    assert _steps(handle, "a") == [0, 1]


def test_what_mlflow_did_not_take_is_delivered_at_the_next_start(tmp_path: Path, storage: str) -> None:
    """The server disappeared in round 2 and was still gone at the end of the run."""
    handle = start(CONFIG, storage, "late", {})
    with RoundLogger(handle) as logger:
        logger.log(1, {"a": 1.0})
    series = [{"round": step, "a": float(step)} for step in range(1, 5)]
    (tmp_path / "training.json").write_text(json.dumps({"undelivered": True, "series": series}))
    run = {"method": "ofmu", "rounds": 4, "status": "finished", "message": "", "model": f"{tmp_path}/model"}
    (tmp_path / "metrics.json").write_text(json.dumps({**METRICS, "cost": COST, "run": run | {"generations": "sane"}}))
    streams = {"forget": {"source": "s3://bucket/f.jsonl", "rows": 7, "sha256": "a" * 64}}
    models = {"unlearned": {"model.safetensors": "b" * 64}}
    code, command = {"commit": "c" * 40}, "ofmu unlearn --model.path /m"
    manifest = {
        "name": "v1.0",
        "command": "ofmu unlearn --model.path /m",
        "code": code,
        "data": {"streams": streams},
        "models": models,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    away = RunHandle(handle.run_id, f"http://user:secret@127.0.0.1:{_free_port()}", handle.experiment_id)
    assert deliver_late(tmp_path, CONFIG, storage) is None
    assert not conclude(tmp_path, away, artifacts=["metrics.json"], status="FINISHED")
    assert "secret" not in (tmp_path / "undelivered.json").read_text()
    assert deliver_late(tmp_path, CONFIG, storage)
    assert not (tmp_path / "undelivered.json").exists()
    assert _steps(handle, "a") == [1, 2, 3, 4]
    run = _client(handle).get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["after/forget_quality"] == 0.42
    client = _client(handle)
    assert {file.path for file in client.list_artifacts(handle.run_id)} == {"metrics.json", "intervals.csv"}
    conclude(tmp_path, handle, artifacts=["metrics.json"], status="FINISHED")  # as after a kill: nothing twice
    run = client.get_run(handle.run_id)
    tags = run.data.tags
    assert (tags["mlflow.source.name"], tags["ofmu.command"]) == ("ofmu unlearn", command)
    assert tags["mlflow.source.git.commit"] == "c" * 40
    assert tags["mlflow.note.content"] == "`ofmu`, 4 rounds: finished · forget quality 0.42\n\nsane"
    (data_set,) = run.inputs.dataset_inputs
    assert (data_set.dataset.name, json.loads(data_set.dataset.profile)) == ("forget", {"rows": 7})
    assert data_set.dataset.digest == handle.run_id, "rows to forget cannot be guessed from it"
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.tags["ofmu.path"]) == ("v1-0", f"{tmp_path}/model")
    assert client.get_experiment(handle.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"


def test_rounds_that_run_again_after_a_rollback_are_logged_again(storage: str) -> None:
    handle = start(CONFIG, storage, "rollback", {})
    with RoundLogger(handle) as logger:
        for step, value in ((1, 1.0), (2, 2.0), (3, float("nan"))):
            logger.log(step, {"a": value})
        logger.rewind(1)
        for step in (2, 3):
            logger.log(step, {"a": 10.0 + step})
    assert _steps(handle, "a") == [1, 2, 2, 3, 3]
    assert _client(handle).get_run(handle.run_id).data.metrics["a"] == 13.0


def test_tensorboard_shows_each_round_once(tmp_path: Path, storage: str) -> None:
    """A run that rolled back to round 2, and was then resumed: the worker logs all rounds so far again."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="not installed")
    handle = start(replace(CONFIG, tensorboard=str(tmp_path)), storage, "events", {})
    assert handle.tensorboard == f"{tmp_path}/events"
    with RoundLogger(handle) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": 1.0 / step, "rho": 0.1})
        logger.rewind(2)
        logger.log(3, {"loss": 7.0})
    with RoundLogger(handle) as logger:
        for step, loss in ((1, 1.0), (2, 0.5), (3, 7.0), (4, 8.0)):
            logger.log(step, {"loss": loss})
    events = accumulators.EventAccumulator(f"{tmp_path}/events").Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 0.5), (3, 7.0), (4, 8.0)]


def test_tensorboard_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"tracking\.tensorboard: it is not installed: pip install 'ofmu-ray\[tensorb"):
        start(TrackingConfig(tensorboard="tb"), str(tmp_path), "events", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("file:///somewhere", "no longer supports folders"),
        ("runs/mlruns", "no longer supports folders"),
        ("http://127.0.0.1:{port}", "not reachable"),
        ("postgresql://user:secret@127.0.0.1:{port}/mlflow", "not reachable"),
        ("http://127.0.0.1:nonsense", "not reachable"),
        ("sqlite:///{tmp}/text.db", "not a SQLite database"),
        ("sqlite:///{tmp}/text.db/below.db", "cannot be written"),
    ],
)
def test_a_wrong_tracking_uri_is_the_users_to_correct(tmp_path: Path, uri: str, words: str) -> None:
    (tmp_path / "text.db").write_text("this is not a database")
    uri = uri.format(port=_free_port(), tmp=tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        start(TrackingConfig(uri=uri), str(tmp_path), "wrong", {})
    assert "tracking.uri" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_remote_storage_needs_a_server() -> None:
    with pytest.raises(UserError, match=r"tracking\.uri = null"):
        start(CONFIG, "s3://bucket/runs", "remote", {})


def test_a_deleted_experiment_is_named(storage: str) -> None:
    config = TrackingConfig(experiment="gone")
    handle = start(config, storage, "deleted", {})
    _client(handle).delete_experiment(handle.experiment_id)
    with pytest.raises(UserError, match=r"tracking\.experiment = 'gone' was deleted"):
        start(config, storage, "deleted", {})


def test_a_worker_without_the_database_is_asked_to_use_a_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need a tracking server"):
        RoundLogger(RunHandle("0" * 32, f"sqlite:///{tmp_path}/mlflow.db", "1"))
    assert not list(tmp_path.iterdir())


def _start_in_a_process(storage: str, name: str) -> str:
    return start(TrackingConfig(), storage, name, {}).experiment_id


@pytest.mark.full
def test_drivers_that_meet_a_fresh_storage_at_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        ids = list(pool.map(_start_in_a_process, [str(tmp_path)] * 3, ["a", "b", "c"]))
    assert len(set(ids)) == 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with mlflow_server(tmp_path) as running:
        yield running.uri


@pytest.mark.system
def test_a_real_server(server: str, tmp_path: Path) -> None:
    config = TrackingConfig(uri=server)
    handle = start(config, "s3://bucket/runs", "served", {"seed": 0}, record=tmp_path / RECORD)
    with RoundLogger(handle) as logger:
        for step in range(5):
            logger.log(step, {"loss": 1.0 / (1 + step)})
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(METRICS))
    assert finish(handle, metrics=METRICS, cost=COST, artifacts=[file], status="FAILED")
    again = start(config, "s3://bucket/runs", "served", {"seed": 0}, record=tmp_path / RECORD)
    assert again == handle
    assert _steps(handle, "loss") == [0, 1, 2, 3, 4]
    assert (tmp_path / "files").is_dir()
    downloaded: Any = _client(handle).download_artifacts(handle.run_id, "metrics.json", str(tmp_path))
    assert json.loads(Path(downloaded).read_text()) == METRICS
    assert (
        open_command(handle)
        == f"{server}/#/experiments/{handle.experiment_id}/runs/{handle.run_id}?workflowType=machine_learning"
    )


def test_the_command_that_opens_a_local_run(storage: str) -> None:
    handle = start(CONFIG, storage, "open", {})
    command, address = open_command(handle).splitlines()
    python, *words = shlex.split(command)
    assert python == sys.executable, "this environment, whatever PATH is"
    assert words == ["-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{storage}/mlflow.db"]
    assert importlib.util.find_spec("mlflow.__main__") is not None
    page = f"#/experiments/{handle.experiment_id}/runs/{handle.run_id}?workflowType=machine_learning"
    assert address == f"http://127.0.0.1:5000/{page}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
