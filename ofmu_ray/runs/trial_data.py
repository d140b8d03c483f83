"""What many runs on the same rows share: checked, tokenised and evaluated once, before the first run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig, UnlearnConfig, close_match
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.registry import Metric, metrics
from ofmu_ray.models.checks import placed
from ofmu_ray.runs.preflight import check_early, check_sources, check_training, other_models
from ofmu_ray.runs.trial import PRIVATE, SplitData
from ofmu_ray.runs.who_evaluates import evaluation_of
from ofmu_ray.tasks import task_named
from ofmu_ray.tasks.protocol import Task


def checked(
    base: UnlearnConfig,
    storage: Path,
    required: Mapping[str, str],
    generation: tuple[str, int | None],
    where: str = "",
    split: str = "",
) -> Any:
    """Check that models, sources and evaluation rows exist and give the metrics that a rule needs.

    `required`: option -> metric. `generation`: option and value of the longest generation of runs that the rule
    judges. `where` is the prefix of base's options in error messages, `split` that of the messages.

    Raises:
        UserError: something is missing, or a metric does not exist or will not be measured.
    """
    task = task_named(base.task)
    check_sources(base.data)
    check_early(task, base)
    evaluation = base.evaluation
    if not evaluation.enabled:
        raise UserError(
            f"{split}{where}evaluation.enabled is false, but runs are compared by their evaluation: set it to true"
        )
    option, longest = generation
    if longest is None:
        option, longest = "evaluation.max_new_tokens", evaluation.max_new_tokens
    known = {one.name: one for one in metrics()}
    for name, metric in required.items():
        if metric not in known:
            raise UserError(f"{name} = {metric!r}: no such metric.{close_match(metric, known)}")
        _check_measured(task, name, known[metric])
        needs = known[metric].needs
        if "retrained" in needs and not evaluation.retrained:
            raise UserError(
                f"{split}{name} = {metric} needs a model without the forget rows: name {where}evaluation.retrained, or "
                "choose another metric (docs/metrics.md)"
            )
        if known[metric].better == "retrained" and not (evaluation.retrained or known[metric].alone):
            raise UserError(
                f"{split}{name} = {metric} should match a model without the forget rows: name "
                f"{where}evaluation.retrained, or choose another metric (docs/metrics.md)"
            )
        if "generations" in needs and longest == 0:
            raise UserError(f"{option} = 0: without generations there is no {name} = {metric}")
        for part in sorted(needs - {"retrained", "generations"}):
            if getattr(evaluation.sets, part) is None:
                raise UserError(f"{split}{name} = {metric} needs rows of {part}: name {where}evaluation.sets.{part}")
    task.check_model(base.model)
    check_training(task, base)
    for option, path in other_models(base).items():
        task.check_model(ModelConfig(path=path), option)
    return evaluation_of(task, base, str(storage))


def _check_measured(task: Task, option: str, metric: Metric) -> None:
    """Refuse what no run of the task measures, and a floor under what should be low. Other tasks measure their own."""
    kind = getattr(task, "rows", None)
    measured = kind is None or (metric.rows == kind and (metric.values or metric.compute))
    if not measured:
        raise UserError(f"{option} = {metric.name}: a run does not measure it; choose another metric (docs/metrics.md)")
    if option.endswith(".utility") and "high" not in (metric.better, metric.alone):
        raise UserError(
            f"{option} = {metric.name}: the floor is for a metric that should be high; choose another (docs/metrics.md)"
        )


def prepare(
    name: str, base: UnlearnConfig, storage: Path, folder: Path, evaluator: Any
) -> tuple[SplitData, dict[str, Any]]:
    """The tokenised streams, and per-row values of the models `target` and `retrained`."""
    from ofmu_ray.data.prepare import prepare_streams

    task = task_named(base.task)
    prepared = prepare_streams(
        base.data.sources,
        base.data.root,
        task.encoder(task.check_model(base.model), base.data),
        str(storage),
        private={"forget": str(folder / PRIVATE / "tokens")},
        overlap=base.data.overlap,
        duplicates=base.data.duplicates,
        whole=base.data.whole,
    )
    tables = {
        model: evaluator.table(path, f"{model} {name}")
        for model, path in (("target", base.model.path), ("retrained", base.evaluation.retrained))
    }
    fingerprint = _fingerprint(base, prepared, evaluator)
    data = SplitData(name, str(folder), prepared, evaluator, tables["retrained"], fingerprint, placed(base.model))
    return data, tables


def _fingerprint(base: UnlearnConfig, prepared: Any, evaluator: Any) -> str:
    """A digest by content: a model trained again under the same path, or different rows, make different runs."""
    from ofmu_ray.models.source import model_fingerprint, weights_folder

    paths = [base.model.path, *other_models(base).values()]
    weights = [model_fingerprint(weights_folder(resolve_builtin(path))) for path in paths]
    streams = [stream.fingerprint for stream in prepared.streams.values()]
    return hashlib.sha256(json.dumps([weights, streams, evaluator.sets]).encode()).hexdigest()
