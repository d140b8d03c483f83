"""Any number of models side by side, with the same code and numbers as a run's evaluation."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ofmu_ray import progress
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig, TrainingConfig, UnlearnConfig, config_hash
from ofmu_ray.config.evaluate import RETRAINED, EvaluateConfig
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.peer_names import peer_values
from ofmu_ray.models.checks import check_place
from ofmu_ray.reporting.manifest import code_version
from ofmu_ray.runs.attack_tasks import Checks
from ofmu_ray.runs.claims import locked, refuse_taken
from ofmu_ray.runs.finished_comparison import inputs_digest, keep_finished, read_finished
from ofmu_ray.runs.preflight import prepare_storage, public, wants_ray
from ofmu_ray.runs.who_evaluates import check_device_map
from ofmu_ray.runs.writing import write_rows
from ofmu_ray.storage import atomic_write, explained, join, local_file, name_of, scratch
from ofmu_ray.tasks import task_named
from ofmu_ray.tasks.protocol import Task


@dataclass(frozen=True)
class Comparison:
    """Models evaluated side by side."""

    home: str
    """Folder or URI of rows.parquet, metrics.json and report.html."""
    metrics: dict[str, dict[str, Any]]
    """Model -> metric -> {"value", "low", "high", "n"} or {"value": null, "reason"}."""
    checks: dict[str, Any]
    """Attack or probe -> model -> metric, as `metrics`."""
    peer: dict[str, dict[str, float | None]]
    """Model -> OpenUnlearning's name -> value; empty without `peer_names`."""
    mlflow: str
    """How to look at it in MLflow."""
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    """Model, without the retrained one -> sentences on forgetting and on damaged answers."""


def compare(config: EvaluateConfig, command: Sequence[str] = ()) -> Comparison:
    """Evaluate, compare, report. Cached results are not computed again, so an interrupted evaluation resumes, and a
    finished one whose options and local files have not changed is read.

    Raises:
        UserError: a model, rows or an option cannot be used.
    """
    with explained(config.storage):
        return _compared(config, command)


def _compared(config: EvaluateConfig, command: Sequence[str]) -> Comparison:
    storage = prepare_storage(config.storage)
    home = join(storage, config.name or f"evaluate-{config_hash(config)[:8]}")
    refuse_taken(home)
    digest = inputs_digest(config)
    before = read_finished(home, digest)
    if before is None:
        return _measured(config, command, storage, home, digest)
    progress.note("evaluation", "finished before, and nothing it read has changed since")
    models, checks = before["metrics"]["models"], before["metrics"]["checks"]
    return Comparison(home, models, checks, before["peer"], before["mlflow"], before["verdicts"])


def _measured(
    config: EvaluateConfig, command: Sequence[str], storage: str, home: str, digest: str | None
) -> Comparison:
    task, models = task_named(config.task), config.compared
    if "texts" not in task.offers:
        _refuse_checks(config)
    for label, path in models.items():
        check_place(path, config.option(label))
    make = getattr(task, "comparison", None)
    evaluation: Any = task.evaluation(_first_run(config), storage) if make is None else make(config, storage)
    checks = Checks(config, evaluation, models)
    for label, path in models.items():
        _check(task, path, config, label, evaluation)
    checks.check_depths()
    if wants_ray():
        from ofmu_ray.cluster.join import join_cluster

        join_cluster(TrainingConfig(), storage, {config.option(label): [path] for label, path in models.items()})
    check_device_map(config.evaluation)
    with locked(home):
        return _tracked(config, command, storage, home, digest, evaluation, checks)


def _tracked(
    config: EvaluateConfig,
    command: Sequence[str],
    storage: str,
    home: str,
    digest: str | None,
    evaluation: Any,
    checks: Checks,
) -> Comparison:
    """Evaluate under an MLflow run, and write everything."""
    from ofmu_ray import tracking

    models = config.compared
    tags, record = {"ofmu.kind": "evaluate"}, join(home, tracking.RECORD)
    handle = tracking.start(config.tracking, storage, name_of(home), public(config), tags, record=record)
    status: Any = "FAILED"
    try:
        tables = {label: evaluation.table(path, label) for label, path in models.items()}
        checks.measure()
        tables = checks.with_gradient_norms(tables)
        metrics = {label: evaluation.metrics(table, tables.get(RETRAINED)) or {} for label, table in tables.items()}
        further, verdicts = checks.metrics(), _verdicts(evaluation, tables, metrics)
        mlflow = tracking.open_command(handle)
        files = _write(home, config, evaluation, models, tables, metrics, further, verdicts, command, mlflow)
        peer = {label: peer_values(tables[label], metrics[label]) for label in models} if config.peer_names else {}
        if peer:
            atomic_write(join(home, "peer_names.json"), json.dumps(peer, indent=2) + "\n")
            files.append("peer_names.json")
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        done = status == "FINISHED"
        logged = _logged(metrics, further) if done else None
        described = partial(
            tracking.describe_comparison, command=shlex.join(command), commit=code_version()["commit"],
            metrics=metrics, words=verdicts,
        ) if done else None  # fmt: skip
        with scratch() as place:
            artifacts = [local_file(join(home, name), place) for name in files] if done else []
            delivered = tracking.finish(handle, metrics=logged, described=described, artifacts=artifacts, status=status)
    if delivered:
        keep_finished(home, digest, peer=peer, mlflow=mlflow, verdicts=verdicts)
    return Comparison(home, metrics, further, peer, mlflow, verdicts)


def _verdicts(evaluation: Any, tables: dict[str, Any], metrics: dict[str, Any]) -> dict[str, list[str]]:
    """`Comparison.verdicts`, as at the end of a run."""
    found: dict[str, list[str]] = {}
    for label, table in tables.items() if hasattr(evaluation, "words") else ():
        if label != RETRAINED:
            words = evaluation.words(table, metrics[label], None, tables.get(RETRAINED))
            found[label] = [words[name] for name in ("forgetting", "generations") if words[name]]
    return found


def _first_run(config: EvaluateConfig) -> UnlearnConfig:
    """A run of the first model with the command's rows and options, as far as its evaluation reads them."""
    first = next(iter(config.models.values()))
    model = ModelConfig(path=first, tokenizer=config.tokenizer, trust_remote_code=config.trust_remote_code)
    names = ("storage", "seed", "task", "data", "evaluation", "report")
    return UnlearnConfig(model=model, **{name: getattr(config, name) for name in names})


def _refuse_checks(config: EvaluateConfig) -> None:
    """Raise UserError if the options ask for what only language models have."""
    asked = [
        f"checks.{field.name}" for field in dataclasses.fields(config.checks)
        if getattr(config.checks, field.name) not in (None, False, [])
    ]  # fmt: skip
    asked += ["peer_names"] if config.peer_names else []
    if asked:
        raise UserError(f"{asked[0]}: for language models only, and task = {config.task!r}: remove it")


def _check(task: Task, path: str, config: EvaluateConfig, label: str, evaluation: Any) -> None:
    """Raise UserError if `path` is no model of the task, or the rows do not fit it."""
    tokenizer = evaluation.tokenizer_of(path) if hasattr(evaluation, "tokenizer_of") else None
    model = ModelConfig(path=path, tokenizer=tokenizer, trust_remote_code=config.trust_remote_code)
    task.check_model(model, config.option(label))
    if hasattr(evaluation, "check_fits"):
        evaluation.check_fits(path, config.option(label))


def _logged(metrics_by_model: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    """What MLflow shows for each model: its metrics, and the attacks' metrics without those of single layers."""
    logged = {label: dict(metrics) for label, metrics in metrics_by_model.items()}
    for check, by_model in further.items():
        for label, metrics in by_model.items():
            logged[label] |= {f"{check}/{name}": value for name, value in metrics.items() if "/layer_" not in name}
    return logged


def _folder(path: str) -> Path:
    """Of a model that its task has accepted; a task of one's own may do without config.json."""
    from ofmu_ray.models.source import model_source, weights_folder

    folder = Path(model_source(resolve_builtin(path), "model"))
    return folder if folder.is_dir() else weights_folder(path)


def _write(
    home: str,
    config: EvaluateConfig,
    evaluation: Any,
    models: dict[str, str],
    tables: dict[str, Any],
    metrics: dict[str, dict[str, Any]],
    further: dict[str, Any],
    verdicts: dict[str, list[str]],
    command: Sequence[str],
    mlflow: str,
) -> list[str]:
    """Write rows.parquet, report.html and, last, metrics.json; return the names of those that MLflow keeps."""
    from ofmu_ray.metrics.classification import with_aliases
    from ofmu_ray.models.source import model_fingerprint
    from ofmu_ray.reporting.evaluation_page import ComparisonData, write_comparison
    from ofmu_ray.reporting.image_section import images_of

    write_rows(join(home, "rows.parquet"), tables)
    write_comparison(
        join(home, "report.html"),
        ComparisonData(
            title=name_of(home),
            metrics=metrics,
            models=models,
            checks=further,
            verdicts=verdicts,
            tokenizers=evaluation.tokenizers() if hasattr(evaluation, "tokenizers") else 1,
            tables=tables,
            images=images_of(evaluation, tables, config.report.samples),
            samples=config.report.samples,
            reveal_text=config.report.reveal_text,
            config=public(config),
            command=list(command),
            open_command=mlflow,
        ),
    )
    weights = {label: model_fingerprint(_folder(path)) for label, path in models.items()}
    aliased = {label: with_aliases(values) for label, values in metrics.items()}
    summary = {"models": aliased, "checks": further, "weights_sha256": weights, "config": public(config)}
    atomic_write(join(home, "metrics.json"), json.dumps(summary, indent=2) + "\n")
    return ["report.html", "metrics.json"]
