"""`ofmu train`: fit a target or a retrained model on a data set, on the same Ray path as unlearning."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from typing import Any

from ofmu_ray.cluster.join import join_cluster, model_paths, source_paths
from ofmu_ray.config import ModelConfig, StopConfig, TrainConfig, outcome_hash
from ofmu_ray.errors import UserError
from ofmu_ray.runs.preflight import check_machine, check_model, claim, placed, prepare_storage, public
from ofmu_ray.storage import atomic_write, explained, is_file, is_whole, join, name_of, remove_folder
from pipelines.parse import fail, parse
from pipelines.terminal import say

PROG = "ofmu train"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, 2 for a user's mistake, 1 when the fit did not end well."""
    try:
        config = parse(TrainConfig, sys.argv[1:] if arguments is None else arguments, PROG)
        with explained(config.storage):
            return train(config)
    except UserError as error:
        return fail(error, PROG)


def train(config: TrainConfig) -> int:
    """Fit, export to <storage>/<name>/model and print where it is. A finished run of this name is not repeated."""
    storage = prepare_storage(config.storage)
    check_machine(config.training)
    digest = outcome_hash(config)
    home = join(storage, config.name or f"train-{digest[:8]}")
    claim(home, digest)
    if is_file(join(home, "training.json")) and is_whole(join(home, "model")):
        say(f"{name_of(home)} is finished; model: {join(home, 'model')}")
        return 0
    claim(home, digest, write=True)
    model = config.model or _initial_model(config, home)
    tokenizer = check_model(model)
    summary = _fit(config, model, tokenizer, storage, home, digest)
    say(f"model   {join(home, 'model')}")
    return 0 if summary["status"] == "finished" else 1


def _fit(
    config: TrainConfig, model: ModelConfig, tokenizer: Any, storage: str, home: str, digest: str
) -> dict[str, Any]:
    from ofmu_ray import tracking
    from ofmu_ray.data.batch_plan import write_plan
    from ofmu_ray.data.prepare import prepare_streams
    from ofmu_ray.training.job import WorkerJob
    from ofmu_ray.training.launch import fit

    handle = tracking.start(config.tracking, storage, name_of(home), public(config), {"ofmu.kind": "train"})
    training = config.training
    rows_at = source_paths("data.train", config.data.train, config.data.root)
    join_cluster(training, storage, model_paths(model) | rows_at, say)
    prepared = prepare_streams(
        {"train": config.data.train},
        config.data.root,
        config.data.format,
        tokenizer,
        storage,
        private={"train": join(home, "tokens")},
        duplicates=config.data.duplicates,
    )
    rows = len(prepared.streams["train"].rows)
    rounds = max(1, math.ceil(config.epochs * rows / training.batch_size))
    training = replace(training, rounds=rounds)
    plan = write_plan(
        prepared.streams,
        join(home, "plan"),
        batches_per_round={"train": 1},
        rounds=rounds,
        batch_size=training.batch_size,
        workers=training.workers,
        seed=config.seed,
    )
    say(f"data    {rows} rows, {rounds} steps of {training.batch_size} rows")
    job = WorkerJob(
        run_dir=home,
        plan_dir=plan.folder,
        config_hash=outcome_hash(config, prepared.streams["train"].fingerprint),
        seed=config.seed,
        model=placed(model),
        method=config.finetune,
        training=training,
        stop=StopConfig(),
        utility_rows=None,
        tracking=handle,
    )
    started = time.perf_counter()
    status: Any = "FAILED"
    summary: dict[str, Any] = {}
    try:
        with tracking.system_metrics(handle, enabled=config.tracking.system_metrics):
            summary = fit(job, "train")
        status = "FINISHED" if summary["status"] == "finished" else "FAILED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        cost = {name: value for name, value in summary.items() if name in ("train_seconds", "peak_memory_bytes")}
        tracking.finish(handle, cost=cost | summary.get("account", {}), status=status)
    manifest = {"config": public(config), "config_hash": digest, "data": prepared.report.to_json()}
    atomic_write(join(home, "manifest.json"), json.dumps(manifest, indent=2) + "\n")
    if summary["status"] == "finished":
        for name in ("tokens", "plan", "train"):
            remove_folder(join(home, name))
    last = summary["series"][-1]["loss"] if summary["series"] else math.nan
    say(f"fit     loss {last:.4f} after {rounds} steps, {time.perf_counter() - started:.0f} s; {summary['status']}")
    if summary["message"]:
        say(summary["message"])
    return summary


def _initial_model(config: TrainConfig, home: str) -> ModelConfig:
    """A Llama from the scratch options with seeded random weights, saved beside the run's model."""
    folder = join(home, "initial")
    if not is_whole(folder):
        from ofmu_ray.models.initial import write_initial_model

        write_initial_model(folder, config)
    return ModelConfig(path=folder)


if __name__ == "__main__":
    sys.exit(main())
