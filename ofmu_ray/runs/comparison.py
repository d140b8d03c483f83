"""Any number of models side by side, with the same code and numbers as a run's evaluation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ofmu_ray import progress
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig, TrainingConfig, config_hash
from ofmu_ray.config.evaluate import RETRAINED, EvaluateConfig
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.evaluator import Evaluator, has_tokenizer, read_sets
from ofmu_ray.metrics.peer_names import peer_values
from ofmu_ray.models.checks import check_model, check_place
from ofmu_ray.reporting.manifest import code_version
from ofmu_ray.runs.attack_tasks import Checks
from ofmu_ray.runs.claims import locked, refuse_taken
from ofmu_ray.runs.finished_comparison import inputs_digest, keep_finished, read_finished
from ofmu_ray.runs.preflight import prepare_storage, public, wants_ray
from ofmu_ray.runs.who_evaluates import check_device_map
from ofmu_ray.runs.writing import write_rows
from ofmu_ray.storage import atomic_write, explained, join, local_file, name_of, scratch


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
    models = _models(config)
    for label, path in models.items():
        check_place(path, _option(label))
        _refuse_classifier(path, _option(label))
    evaluator = _evaluator(config, storage)
    checks = Checks(config, evaluator, models)
    for label, path in models.items():
        _check(path, _option(label), evaluator)
    checks.check_depths()
    if wants_ray():
        from ofmu_ray.cluster.join import join_cluster

        join_cluster(TrainingConfig(), storage, {_option(label): [path] for label, path in models.items()})
    check_device_map(config.evaluation)
    with locked(home):
        return _tracked(config, command, storage, home, digest, evaluator, checks)


def _tracked(
    config: EvaluateConfig,
    command: Sequence[str],
    storage: str,
    home: str,
    digest: str | None,
    evaluator: Evaluator,
    checks: Checks,
) -> Comparison:
    """Evaluate under an MLflow run, and write everything."""
    from ofmu_ray import tracking

    models = _models(config)
    tags, record = {"ofmu.kind": "evaluate"}, join(home, tracking.RECORD)
    handle = tracking.start(config.tracking, storage, name_of(home), public(config), tags, record=record)
    status: Any = "FAILED"
    try:
        tables = {label: evaluator.table(path, label) for label, path in models.items()}
        checks.measure()
        tables = checks.with_gradient_norms(tables)
        metrics = {label: evaluator.metrics(table, tables.get(RETRAINED)) or {} for label, table in tables.items()}
        further, verdicts = checks.metrics(), _verdicts(evaluator, tables, metrics)
        mlflow = tracking.open_command(handle)
        files = _write(home, config, evaluator, models, tables, metrics, further, verdicts, command, mlflow)
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


def _verdicts(evaluator: Evaluator, tables: dict[str, Any], metrics: dict[str, Any]) -> dict[str, list[str]]:
    """`Comparison.verdicts`, as at the end of a run."""
    found = {}
    for label, table in tables.items():
        if label != RETRAINED:
            words = evaluator.words(table, metrics[label], None, tables.get(RETRAINED))
            found[label] = [words[name] for name in ("forgetting", "generations") if words[name]]
    return found


def _models(config: EvaluateConfig) -> dict[str, str]:
    """Label -> folder or hub name, with the retrained model last."""
    reference = {RETRAINED: config.evaluation.retrained} if config.evaluation.retrained else {}
    return config.models | reference


def _refuse_classifier(path: str, option: str) -> None:
    """Raise UserError if `path` is a folder with an image classifier, before a tokenizer is asked for."""
    config = Path(resolve_builtin(path)) / "config.json"
    kinds = json.loads(config.read_text()).get("architectures") or () if config.is_file() else ()
    if any("ImageClassification" in kind for kind in kinds):
        raise UserError(
            f"{option} = {path!r} is an image classifier: `ofmu evaluate`, its probes and its attacks are for language "
            "models; a classifier's metrics are in the report and metrics.json of its run (ofmu unlearn)"
        )


def _check(path: str, option: str, evaluator: Evaluator) -> None:
    """Raise UserError if `path` is no model, has no tokenizer, or the rows do not fit it."""
    tokenizer = evaluator.tokenizer_of(path)
    check_model(ModelConfig(path=path, tokenizer=tokenizer, trust_remote_code=evaluator.trust_remote_code), option)
    evaluator.check_fits(path, option)


def _logged(metrics_by_model: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    """What MLflow shows for each model: its metrics, and the attacks' metrics without those of single layers."""
    logged = {label: dict(metrics) for label, metrics in metrics_by_model.items()}
    for check, by_model in further.items():
        for label, metrics in by_model.items():
            logged[label] |= {f"{check}/{name}": value for name, value in metrics.items() if "/layer_" not in name}
    return logged


def _option(label: str) -> str:
    return "evaluation.retrained" if label == RETRAINED else f"models.{label}"


def _tokenizer(config: EvaluateConfig) -> str:
    """The tokenizer for models that come without one."""
    path = config.tokenizer or next(filter(has_tokenizer, config.models.values()), None)
    if path is None:
        raise UserError("tokenizer: none of the models comes with one; name a folder or a hub name with --tokenizer")
    return path


def _evaluator(config: EvaluateConfig, storage: str) -> Evaluator:
    tokenizer = _tokenizer(config)
    reader = ModelConfig(path=tokenizer, trust_remote_code=config.trust_remote_code)
    return Evaluator(
        config.evaluation,
        config.data,
        tokenizer,
        join(storage, "cache"),
        config.seed,
        config.report.reveal_text,
        config.trust_remote_code,
        sets=read_sets(config.evaluation, config.data, reader),
        own_tokenizers=config.tokenizer is None,
        models=tuple(_models(config).values()),
    )


def _write(
    home: str,
    config: EvaluateConfig,
    evaluator: Evaluator,
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
    from ofmu_ray.models.source import model_fingerprint, weights_folder
    from ofmu_ray.reporting.evaluation_page import ComparisonData, write_comparison

    write_rows(join(home, "rows.parquet"), tables)
    write_comparison(
        join(home, "report.html"),
        ComparisonData(
            title=name_of(home),
            metrics=metrics,
            models=models,
            checks=further,
            verdicts=verdicts,
            tokenizers=len({evaluator.loading(path).template.fingerprint() for path in models.values()}),
            config=public(config),
            command=list(command),
            open_command=mlflow,
        ),
    )
    weights = {label: model_fingerprint(weights_folder(resolve_builtin(path))) for label, path in models.items()}
    aliased = {label: with_aliases(values) for label, values in metrics.items()}
    summary = {"models": aliased, "checks": further, "weights_sha256": weights, "config": public(config)}
    atomic_write(join(home, "metrics.json"), json.dumps(summary, indent=2) + "\n")
    return ["report.html", "metrics.json"]
