"""What many runs on the same rows share: checked, tokenised and evaluated once, before the first of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig, UnlearnConfig, close_match
from ofmu_ray.errors import UserError
from ofmu_ray.models.checks import placed
from ofmu_ray.runs.preflight import check_sources
from ofmu_ray.runs.trial import PRIVATE, SplitData
from ofmu_ray.tasks import task_named


def checked(
    base: UnlearnConfig, storage: Path, asked: Mapping[str, str], generation: tuple[str, int | None], where: str = ""
) -> Any:
    """Models, sources and evaluation rows are there, and give the figures that a rule asks for.

    `asked`: option -> figure. `generation`: option and value of the longest generation of runs that are judged by the
    rule. `where` leads the messages.

    Raises:
        UserError: something is missing, or a figure does not exist or will not be measured.
    """
    from ofmu_ray.metrics.summary import FIGURES

    task = task_named(base.task)
    task.check_model(base.model)
    check_sources(base.data)
    evaluation = base.evaluation
    if evaluation.retrained:
        task.check_model(ModelConfig(path=evaluation.retrained), "evaluation.retrained")
    if not evaluation.enabled:
        raise UserError(f"{where}evaluation.enabled is false, but runs are to be compared by their evaluation")
    option, longest = generation
    if longest is None:
        option, longest = "evaluation.max_new_tokens", evaluation.max_new_tokens
    for name, figure in asked.items():
        if figure not in FIGURES:
            raise UserError(f"{name} = {figure!r}: no such figure.{close_match(figure, FIGURES)}")
        if figure in ("forget_quality", "ks_statistic") and not evaluation.retrained:
            raise UserError(
                f"{where}{name} = {figure} needs a model without the forget rows: name evaluation.retrained"
            )
        if longest == 0 and _generated(figure):
            raise UserError(f"{option} = 0: without generations there is no {name} = {figure}")
        for part in ("real_authors", "world_facts"):
            needed = figure == "model_utility" or figure.startswith(f"{part}_")
            if needed and getattr(evaluation.sets, part) is None:
                raise UserError(f"{where}{name} = {figure} needs rows of {part}: name evaluation.sets.{part}")
    return task.evaluation(base, storage)


def _generated(figure: str) -> bool:
    measures = ("rouge", "_empty", "_repetition", "_length", "_ngram_entropy", "_ngram_variety")
    return figure == "model_utility" or figure.endswith(measures)


def prepare(
    name: str, base: UnlearnConfig, storage: Path, folder: Path, evaluator: Any
) -> tuple[SplitData, dict[str, Any]]:
    """The tokenised streams, and per-row values of the target and of the retrained model by these names."""
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
    )
    tables = {
        model: evaluator.table(path, f"{model} {name}")
        for model, path in (("target", base.model.path), ("retrained", base.evaluation.retrained))
    }
    fingerprint = _fingerprint(base, prepared, evaluator)
    data = SplitData(name, str(folder), prepared, evaluator, tables["retrained"], fingerprint, placed(base.model))
    return data, tables


def _fingerprint(base: UnlearnConfig, prepared: Any, evaluator: Any) -> str:
    """By content: a model that was fitted anew under the same path, or other rows, make other runs."""
    from ofmu_ray.evaluation.cache import model_fingerprint, weights_folder

    paths = [path for path in (base.model.path, base.evaluation.retrained) if path]
    weights = [model_fingerprint(weights_folder(resolve_builtin(path))) for path in paths]
    streams = [stream.fingerprint for stream in prepared.streams.values()]
    return hashlib.sha256(json.dumps([weights, streams, evaluator.sets]).encode()).hexdigest()
