"""What a run writes to its folder: metrics.json, rows.parquet, manifest.json, report.html and the model card."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.runs.job import remove_text
from ofmu_ray.runs.outcome import cost_of
from ofmu_ray.storage import PathLike, atomic_write, join, name_of


@dataclass(frozen=True)
class RunResults:
    """Results of a finished run, before they are written."""

    training: dict[str, Any]
    """training.json: status, series, seconds, account."""
    metrics: dict[str, Any]
    """before, after, retrained."""
    tables: dict[str, Any]
    """Per-row values (pyarrow Tables) by model."""
    texts: dict[str, tuple[str, str]]
    """Row id -> (question, answer), for the samples of the report."""
    verdict: dict[str, Any]
    """What follows only from all models together (`Evaluation.verdict`)."""
    data: dict[str, Any]
    """The data report."""
    seconds: dict[str, float]
    """Wall-clock seconds by phase."""
    plan: str
    """Fingerprint of the batch sequence."""
    images: Any = None
    """Of image classifiers: ofmu_ray.reporting.image_section.Images."""


def write(
    home: str, results: RunResults, config: dict[str, Any], config_hash: str, command: Sequence[str], mlflow: str
) -> list[str]:
    """Write everything to a run's folder or URI, and delete what contains the forget rows' text.

    metrics.json comes last: it marks the run as finished, so a run killed before that can resume.

    Returns the names of the files that MLflow keeps as artifacts.
    """
    from ofmu_ray.metrics.classification import with_aliases
    from ofmu_ray.reporting.card import write_model_card
    from ofmu_ray.reporting.manifest import build_manifest
    from ofmu_ray.reporting.page import ReportData, write_report

    training = results.training
    summary = {
        **{model: metrics and with_aliases(metrics) for model, metrics in results.metrics.items()},
        **{name: value for name, value in results.verdict.items() if name != "run"},
        "cost": cost_of(training, results.seconds),
        "run": {
            **_run(home, results, config),
            "config_hash": config_hash,
            "mlflow": mlflow,
            **_samples(results, config["report"]["reveal_text"]),
        },
    }
    manifest = build_manifest(
        name=name_of(home),
        config=config,
        config_hash=config_hash,
        seed=config["seed"],
        data=results.data,
        models={role: path and resolve_builtin(path) for role, path in _models(home, config).items()},
        command=shlex.join(command),
        extra={"plan_sha256": results.plan},
    )
    atomic_write(join(home, "manifest.json"), json.dumps(manifest, indent=2) + "\n")
    tables = {label: table for label, table in results.tables.items() if table is not None}
    if tables:
        write_rows(join(home, "rows.parquet"), tables)
    write_report(
        join(home, "report.html"),
        ReportData(
            title=name_of(home),
            config=config,
            metrics=results.metrics,
            run=summary["run"],
            cost=summary["cost"],
            series=training["series"],
            tables=tables,
            texts=results.texts,
            images=results.images,
            data=results.data,
            manifest=manifest,
            command=list(command),
            open_command=mlflow,
            samples=config["report"]["samples"],
            reveal_text=config["report"]["reveal_text"],
        ),
    )
    write_model_card(
        join(home, "model"),
        name=name_of(home),
        config=config,
        metrics=results.metrics,
        data=results.data,
        config_hash=config_hash,
        rounds=training["round"],
    )
    remove_text(home)  # before the run counts as finished, so that a kill leaves no text
    atomic_write(join(home, "metrics.json"), json.dumps(_json(summary), indent=2) + "\n")
    return ["report.html", "manifest.json", "metrics.json"]


TERMINAL_SAMPLES = 3
"""Answers to forget prompts that the terminal shows."""


def _samples(results: RunResults, reveal: bool) -> dict[str, Any]:
    """For the terminal: the answers to forget prompts with the most damage, if they may be shown."""
    from ofmu_ray.reporting.samples import sample_rows

    if not reveal:
        return {}
    tables = {label: table for label, table in results.tables.items() if table is not None}
    rows = sample_rows(tables, results.texts, TERMINAL_SAMPLES, reveal=True).get("forget", [])
    texts = [{"question": row.question} | {label: one.text for label, one in row.generations.items()} for row in rows]
    return {"samples": [row for row in texts if row["question"] and row.get("before") and row.get("after") is not None]}


def write_rows(path: PathLike, tables: dict[str, Any]) -> None:
    """Write per-row values of all models, without forget rows' text unless report.reveal_text is set."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    named = [table.append_column("model", pa.array([label] * len(table))) for label, table in tables.items()]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(named), buffer)
    atomic_write(path, buffer.getvalue().to_pybytes())


def _models(home: PathLike, config: dict[str, Any]) -> dict[str, str | None]:
    return {
        "target": config["model"]["path"],
        "retrained": config["evaluation"]["retrained"],
        "unlearned": join(home, "model"),
    }


def _run(home: PathLike, results: RunResults, config: dict[str, Any]) -> dict[str, Any]:
    """The run's outcome and paths."""
    training = results.training
    return {
        "name": name_of(home),
        "method": config["method"],
        "status": training["status"],
        "message": training["message"],
        "notes": training["notes"],
        **results.verdict.get("run", {}),
        **_samples(results, config["report"]["reveal_text"]),
        "rounds": training["round"],
        "seed": config["seed"],
        "model": join(home, "model"),
        "report": join(home, "report.html"),
    }


def _json(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
