"""`ofmu evaluate`: any number of models side by side, by the same code and with the same numbers as a run's end."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig, config_hash
from ofmu_ray.config.evaluate import RETRAINED, EvaluateConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage import atomic_write
from pipelines.checks import Checks
from pipelines.evaluation import Evaluator, read_sets
from pipelines.parse import fail, parse
from pipelines.preflight import check_model, prepare_storage, public
from pipelines.results import write_rows
from pipelines.terminal import metrics_table, say

PROG = "ofmu evaluate"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, 2 for a user's mistake."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(EvaluateConfig, words, PROG)
        return evaluate(config, command=[PROG, *words])
    except UserError as error:
        return fail(error, PROG)


def evaluate(config: EvaluateConfig, command: list[str]) -> int:
    """Evaluate, compare, report. What is in the cache is not run again, so an interrupted evaluation goes on."""
    from ofmu_ray import tracking
    from ofmu_ray.training.launch import connect

    storage = prepare_storage(config.storage)
    folder = storage / (config.name or f"evaluate-{config_hash(config)[:8]}")
    models = _models(config)
    for label, path in models.items():
        check_model(ModelConfig(path=path, trust_remote_code=config.trust_remote_code), _option(label))
    evaluator = _evaluator(config, storage)
    checks = Checks(config, evaluator, models)
    connect(1)
    folder.mkdir(parents=True, exist_ok=True)
    handle = tracking.start(config.tracking, str(storage), folder.name, public(config), {"ofmu.kind": "evaluate"})
    status: Any = "FAILED"
    try:
        tables = {label: evaluator.table(path, label) for label, path in models.items()}
        tables = checks.with_gradient_norms(tables)
        figures = {label: evaluator.figures(table, tables.get(RETRAINED)) or {} for label, table in tables.items()}
        sections, further = checks.run()
        mlflow = tracking.open_command(handle)
        files = _write(folder, config, models, tables, figures, sections, further, command, mlflow)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        done = status == "FINISHED"
        tracking.finish(handle, metrics=figures if done else None, artifacts=files if done else (), status=status)
    print(metrics_table(figures, list(figures)))
    say(f"report  {folder / 'report.html'}")
    say(f"mlflow  {mlflow}")
    return 0


def _models(config: EvaluateConfig) -> dict[str, str]:
    """Label -> folder or hub name; the retrained model last."""
    reference = {RETRAINED: config.evaluation.retrained} if config.evaluation.retrained else {}
    return config.models | reference


def _option(label: str) -> str:
    return "evaluation.retrained" if label == RETRAINED else f"models.{label}"


def _evaluator(config: EvaluateConfig, storage: Path) -> Evaluator:
    return Evaluator(
        replace(config.evaluation, enabled=True),
        config.data,
        config.tokenizer or next(iter(config.models.values())),
        storage / "cache",
        config.seed,
        config.report.reveal_text,
        config.trust_remote_code,
        sets=read_sets(config.evaluation, config.data),
    )


def _write(
    folder: Path,
    config: EvaluateConfig,
    models: dict[str, str],
    tables: dict[str, Any],
    figures: dict[str, dict[str, Any]],
    sections: list[Any],
    further: dict[str, Any],
    command: list[str],
    mlflow: str,
) -> list[Path]:
    """rows.parquet, report.html and, last, metrics.json; returns what MLflow keeps as artifacts."""
    from ofmu_ray.evaluation.cache import model_fingerprint, weights_folder
    from ofmu_ray.reporting.comparison import ComparisonData, write_comparison

    write_rows(folder / "rows.parquet", tables)
    write_comparison(
        folder / "report.html",
        ComparisonData(
            title=folder.name,
            metrics=figures,
            models=models,
            sections=sections,
            config=public(config),
            command=command,
            open_command=mlflow,
        ),
    )
    weights = {label: model_fingerprint(weights_folder(resolve_builtin(path))) for label, path in models.items()}
    summary = {"models": figures, "checks": further, "weights_sha256": weights, "config": public(config)}
    atomic_write(folder / "metrics.json", json.dumps(summary, indent=2) + "\n")
    return [folder / name for name in ("report.html", "metrics.json")]


if __name__ == "__main__":
    sys.exit(main())
