"""One unlearning run as a value: trained, evaluated and recorded, in a warm process or through Ray Train."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofmu_ray.config import ModelConfig, UnlearnConfig, config_hash, flatten, to_dict
from ofmu_ray.errors import user_error_within
from ofmu_ray.models.source import adapter_base, correct_base
from ofmu_ray.runs.job import EVALUATED, Spec, make_job, with_references
from ofmu_ray.runs.who_evaluates import evaluates_live
from ofmu_ray.storage import atomic_write
from ofmu_ray.tasks import task_named

if TYPE_CHECKING:
    from ofmu_ray.training.worker_job import WorkerJob

PRIVATE = "private"
"""A benchmark's folder for what would reveal forget rows' text; removed when the benchmark ends."""


@dataclass(frozen=True)
class SplitData:
    """What all runs on a split share; the driver prepares it once."""

    name: str
    folder: str
    """The benchmark's folder."""
    prepared: Any
    """ofmu_ray.data.prepare.PreparedData: the tokenised streams."""
    evaluator: Any
    """The task's Evaluation, on all rows."""
    retrained: Any
    """Per-row values of the retrained model (pyarrow Table), or None."""
    fingerprint: str
    """Digest of the target's and the retrained model's weights, the rows and the evaluation rows."""
    model: ModelConfig
    """The target, as resolved by the driver: a run's process may have another working directory."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run to do."""

    method: str
    split: str
    phase: str
    """tune, report, ablation, or cost: two rounds that measure a round's cost."""
    trial: int
    config: UnlearnConfig
    options: Mapping[str, Any]
    """Drawn or chosen options, as dotted overrides."""
    budget_unit: str
    budget: float
    rows: int | None = None
    """Number of evenly spread rows per set that the run is judged on; None: all."""

    def key(self, data: SplitData) -> str:
        """Digest of everything that determines the result."""
        from ofmu_ray.metrics.functions import METRIC_VERSION

        run = [self.method, self.phase, str(self.trial), self.budget_unit, repr(self.budget), str(self.rows)]
        return config_hash(self.config, *run, str(METRIC_VERSION), data.fingerprint)

    @property
    def name(self) -> str:
        """A readable name."""
        number = f"seed {self.config.seed}" if self.phase != "tune" else str(self.trial)
        return f"{self.method} {self.split} {self.phase} {number}"


@dataclass(frozen=True, kw_only=True)
class TrialHooks:
    """What a sweep needs from its trials in addition to the result."""

    stages: int
    """Number of evaluations of a run, including the final one."""
    tracking: Any = None
    """MLflow run of the trial, for its series."""
    parent: str | None = None
    """Key of the trial whose weights and optimisers this one continues from."""


def result_path(folder: str | Path, key: str) -> Path:
    """Path of a finished run's result; its rows are next to it as Parquet."""
    return Path(folder) / "trials" / f"{key}.json"


def read_result(folder: str | Path, key: str) -> dict[str, Any] | None:
    """The result written by `run_trial`, or None."""
    path = result_path(folder, key)
    return json.loads(path.read_text()) if path.exists() else None


def model_path(folder: str | Path, key: str) -> Path:
    """Path of a finished trial's model, as long as it is kept."""
    return Path(folder) / "models" / key


def checkpoint_path(folder: str | Path, key: str) -> Path:
    """Path of a trial's checkpoints that others continue from."""
    return Path(folder) / "checkpoints" / key


def work_path(folder: str | Path, key: str) -> Path:
    """Path of a trial's plan, checkpoints and stages while it runs."""
    return Path(folder) / "work" / key


def run_trial(trial: Trial, data: SplitData, *, local: bool, watch: TrialHooks | None = None) -> dict[str, Any]:
    """Run, evaluate, and write <folder>/trials/<key>.json atomically, whatever happens; return its content.

    `local`: in this process (engine torch, one worker); otherwise through Ray Train, from the driver. An exception
    becomes a result with status `failed`, so that one bad draw does not end a benchmark. With `watch`, the model is
    kept (`model_path`), and so are the checkpoints of a run that was stopped early (`checkpoint_path`).
    """
    started = time.perf_counter()
    work = work_path(data.folder, trial.key(data))
    try:
        result = _run(trial, data, work, local, watch)
    except Exception as error:  # out of memory, an option that this model does not take, a bug in one method
        result = {"status": "failed", "message": reason(error)}
        _free_device()
    evaluations = {} if watch is None else {"evaluations": published(work)}
    total = {"total_seconds": time.perf_counter() - started}
    content = write_result(trial, data, result | evaluations | total)
    shutil.rmtree(work, ignore_errors=True)  # last, so that an earlier kill loses nothing
    return content


def published(work: Path) -> list[dict[str, Any]]:
    """A run's intermediate evaluations, oldest first."""
    return [json.loads(path.read_text()) for path in sorted((work / "stages").glob("*.json"))]


def write_failure(trial: Trial, data: SplitData, message: str) -> dict[str, Any]:
    """Write the result of a run that could not record its own failure."""
    return write_result(trial, data, {"status": "failed", "message": message, "total_seconds": 0.0})


def write_result(trial: Trial, data: SplitData, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write <folder>/trials/<key>.json atomically: the trial's description and `result`; return its content."""
    known = {name: getattr(trial, name) for name in ("method", "split", "phase", "trial", "budget_unit", "budget")}
    known |= {"seed": trial.config.seed, "options": dict(trial.options), "ended": time.time()}
    content: dict[str, Any] = _finite({**known, **result})
    atomic_write(result_path(data.folder, trial.key(data)), json.dumps(content, indent=1) + "\n")
    return content


def reason(error: BaseException) -> str:
    """One line about an exception, without rows' text (which no exception of this project contains)."""
    mistake = user_error_within(error)
    if mistake is not None:
        return str(mistake)
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:300]}"


def _run(trial: Trial, data: SplitData, work: Path, local: bool, watch: TrialHooks | None) -> dict[str, Any]:
    from ofmu_ray.training.export import export_model
    from ofmu_ray.training.live import LiveEvaluation
    from ofmu_ray.training.stages import Stages
    from ofmu_ray.training.start import run_local

    clock = _Clock()
    job = job_of(trial, data, work)
    config = trial.config
    evaluation = data.evaluator.sampled(trial.rows, config.evaluation, config.seed)  # the rows that it is judged on
    if not local and trial.phase != "cost" and evaluates_live(config, job.training, evaluation):
        job = replace(job, live=LiveEvaluation(folder=str(work / EVALUATED), evaluation=evaluation, before=False))
    if watch is not None:
        stages = Stages(
            folder=str(work / "stages"),
            count=watch.stages,
            evaluation=evaluation,
            retrained=data.retrained,
            live=not local and evaluates_live(config, job.training, evaluation, on_the_way=True),
        )
        job = replace(job, tracking=watch.tracking, stages=stages)
        if watch.parent is not None:
            job = replace(job, start_from=str(checkpoint_path(data.folder, watch.parent)))
    _reset_peak()
    clock.lap("start_seconds")
    if local:
        worker = run_local(job)
        summary = vars(worker.state) | {"account": worker.engine.account.state()}
    else:
        from ofmu_ray.training.launch import fit

        summary = fit(job, trial.name)
    clock.lap("run_seconds")
    counts = summary["account"]
    result = {
        "status": summary["status"],
        "message": summary["message"],
        "rounds": summary["round"],
        "forget_passes": counts["gradient_passes"]["forget"],
        "retain_passes": counts["gradient_passes"]["retain"],
        "updates": counts["updates"],
        "tokens": counts["tokens"],
        "flops": counts["flops"],
        "train_seconds": summary["train_seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }
    if trial.phase == "cost":
        result["mean_tokens"] = _mean_tokens(job.plan_dir)
        return result | _last_round(result, summary["series"]) | clock.laps
    if summary["status"] == "stopped":
        [last] = (work / "train").glob("*round_*_stopped")
        _move(last, checkpoint_path(data.folder, trial.key(data)))
    else:
        live = local and task_named(job.task).exported_as_is(worker.module, job.model, job.export)
        if local and (watch is not None or not live):
            export_model(job, worker.engine, worker.module, worker.processor, worker.state, 0)
        if live:  # in memory; the worker is done
            table = evaluation.live_table(worker.module, worker.processor, trial.name)
        elif job.live is not None:
            table, _ = job.live.table("after")
        else:
            table = evaluation.table(str(work / "model"), trial.name)
        _keep_rows(table, result_path(data.folder, trial.key(data)).with_suffix(".parquet"))
        result["figures"] = evaluation.metrics(table, data.retrained)
        clock.lap("evaluation_seconds")
        if watch is not None:
            base = adapter_base(work / "model")
            _move(work / "model", kept := model_path(data.folder, trial.key(data)))
            correct_base(kept, base)
    return result | clock.laps


def _last_round(result: Mapping[str, Any], series: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last round's cost alone: finite differences calibrate their steps in the first round, which costs more."""
    if len(series) < 2:
        return {}
    names = ("forget_passes", "retain_passes")
    passes = {name: series[-1][name] - series[-2][name] for name in names}
    share = sum(passes.values()) / sum(result[name] for name in names)
    return {**passes, "rounds": 1, "flops": result["flops"] * share}


def _move(folder: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder, place)


def job_of(trial: Trial, data: SplitData, work: Path) -> WorkerJob:
    """The worker's job; writes its batch plan and what the method needs to know about the rows."""
    model = replace(trial.config.model, path=data.model.path, tokenizer=data.model.tokenizer)
    spec, cache = Spec.of(trial.config, model), str(data.evaluator.cache)
    job, plan = make_job(spec, data.prepared, str(work), cache, trial.key(data), here=True)
    return with_references(job, spec, data.prepared, plan, cache, private=str(Path(data.folder) / PRIVATE))


def _mean_tokens(plan_dir: str) -> dict[str, float]:
    """Mean number of tokens of each stream's rows in a plan."""
    import pyarrow.compute as pc

    from ofmu_ray.data.batch_plan import read_plan
    from ofmu_ray.data.shard_files import read_pieces, shard_files

    plan = read_plan(plan_dir)
    tokens: dict[str, list[int]] = {name: [] for name in plan.streams}
    order = [name for name in plan.streams for _ in range(plan.batches_per_round[name] * plan.share)]
    for shard in range(plan.workers):
        for path in shard_files(plan, shard):
            for table in read_pieces(path):
                texts = "input_ids" in table.column_names  # an image counts as one token
                lengths = pc.list_value_length(table["input_ids"]).to_pylist() if texts else [1] * len(table)
                for position, length in zip(table["position"].to_pylist(), lengths, strict=True):
                    tokens[order[position % plan.rows_per_round]].append(length)
    return {name: sum(counts) / len(counts) for name, counts in tokens.items() if counts}


# ------------------------------------------------------------------------------------------------------ evaluation


def _keep_rows(table: Any, path: Path) -> None:
    """Write the per-row values next to the result."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    atomic_write(path, buffer.getvalue().to_pybytes())


def cost_signature(config: UnlearnConfig) -> dict[str, Any]:
    """What determines the cost of a round: all options; of the method's real numbers, only whether they are 0."""
    chosen = flatten(to_dict(config.method_options))
    rates = tuple(f"{name}." for name in config.method_options.optimizer_fields)
    of_method = {
        name: bool(value) if isinstance(value, float) else value
        for name, value in chosen.items()
        if not name.startswith(rates)
    }
    others = flatten({name: value for name, value in to_dict(config).items() if name != config.method})
    return {f"{config.method}.{name}": value for name, value in of_method.items()} | others


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def _reset_peak() -> None:
    """Reset this process's memory peak, so that a warm process does not report that of an earlier run.

    The resident set still includes the interpreter and what the allocator keeps. If the system does not allow a reset,
    the peak is that of all runs of the process.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return


def _free_device() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
