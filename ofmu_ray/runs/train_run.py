"""`ofmu train`: fit a model to rows, from scratch or from a given one."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from functools import partial
from typing import Any

from ofmu_ray import progress
from ofmu_ray.config import ModelConfig, TrainConfig, outcome_hash
from ofmu_ray.errors import UserError
from ofmu_ray.models.checks import placed
from ofmu_ray.reporting.manifest import code_version
from ofmu_ray.runs.job import TOKENS, make_job, remove_text
from ofmu_ray.runs.outcome import Outcome, cost_of, read_trained
from ofmu_ray.runs.preflight import check_early, check_task_on_nodes, check_training, public
from ofmu_ray.runs.this_run import Run, fit_rounds, threads, tracked
from ofmu_ray.storage import atomic_write, is_whole, join, name_of, remove_folder
from ofmu_ray.tasks import task_named


def train(this_run: Run, config: TrainConfig) -> Outcome:
    """Run to the end, or from the newest checkpoint. Raises UserError as `runs.run.run`."""
    if config.model is not None:
        task = task_named(config.task)
        check_early(task, config)
        task.check_model(config.model)
        check_training(task, config)
    with this_run.claim.held():
        return _fitted(this_run, config)


def _fitted(this_run: Run, config: TrainConfig) -> Outcome:
    from ofmu_ray import tracking
    from ofmu_ray.cluster.join import join_cluster, model_paths, source_paths
    from ofmu_ray.data.prepare import prepare_streams

    home = this_run.home
    task = task_named(config.task)
    model = config.model or _initial_model(task, config, home)
    encoder = task.encoder(task.check_model(model), config.data)
    with tracked(this_run, {"ofmu.kind": "train"}) as handle:
        if not this_run.here:
            rows_at = source_paths("data.train", config.data.source, config.data.root)
            join_cluster(config.training, this_run.storage, model_paths(model) | rows_at)
            check_task_on_nodes(config.task)
        prepared = prepare_streams(
            {"train": config.data.source},
            config.data.root,
            encoder,
            this_run.storage,
            private={"train": join(home, TOKENS)},
            duplicates=config.data.duplicates,
            whole=config.data.whole,
        )
        this_run.claim.note_sources(prepared.sources)
        stream = prepared.streams["train"]
        rounds = max(1, math.ceil(config.epochs * stream.used_rows / config.training.batch_size))
        progress.note("data", f"{stream.used_rows} rows, {rounds} steps of {config.training.batch_size} rows")
        spec = this_run.spec(placed(model))
        spec = replace(spec, training=replace(spec.training, rounds=rounds))
        job, _ = make_job(spec, prepared, home, this_run.cache, outcome_hash(config, stream.fingerprint))
        with this_run.phase("training"), threads(this_run):
            summary = fit_rounds(this_run, replace(job, tracking=handle))
    status: Any = "FINISHED" if summary["status"] == "finished" else "FAILED"
    manifest = {
        "name": name_of(home),
        "command": shlex.join(this_run.command),
        "config": public(config),
        "config_hash": this_run.digest,
        "code": code_version(),
        "data": prepared.report.to_json(),
    }
    atomic_write(join(home, "manifest.json"), json.dumps(manifest, indent=2) + "\n")
    note = f"fitted for {summary['round']} steps of {config.training.batch_size} rows: {summary['status']}"
    described = partial(
        tracking.describe_fit, manifest=manifest, note=note, model=join(home, "model"), steps=summary["round"]
    )
    cost = _train_cost(summary)
    delivered = tracking.finish(handle, cost=cost, described=described, status=status)
    if summary["status"] == "finished":
        remove_text(home)
        remove_folder(join(home, "train"))
    if summary["message"]:
        progress.note("stop", summary["message"])
    outcome = read_trained(home)
    assert outcome is not None
    return replace(outcome, delivered=delivered, cost=cost_of(summary, this_run.seconds))


def _train_cost(summary: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, Any] = summary["account"]
    return {name: summary[name] for name in ("train_seconds", "peak_memory_bytes")} | counts


def _initial_model(task: Any, config: TrainConfig, home: str) -> ModelConfig:
    """The task's model from scratch with seeded random weights, saved next to the run's model."""
    folder = join(home, "initial")
    if not hasattr(task, "initial"):
        raise UserError(f"model is not set, and task = {config.task!r} makes none from scratch: set --model.path")
    if not is_whole(folder):
        task.initial(folder, config)
    return ModelConfig(path=folder)
