"""One unlearning run as a value: trained, evaluated and written down, in a warm process or through Ray Train."""

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
from ofmu_ray.runs.job import Spec, make_job, with_references
from ofmu_ray.storage import atomic_write

if TYPE_CHECKING:
    from ofmu_ray.training.worker_job import WorkerJob

PRIVATE = "private"
"""Folder of a benchmark for what would give forget rows' text away; it goes when the benchmark ends."""


@dataclass(frozen=True)
class SplitData:
    """What all runs on a split share, prepared once by the driver."""

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
    """Digest of the target's and the retrained model's weights, of the rows and of the evaluation rows."""
    model: ModelConfig
    """The target, as the driver found it: a run's process may have another working directory."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run that is to be done."""

    method: str
    split: str
    phase: str
    """tune, report, ablation, or cost: two rounds whose account says what a round costs."""
    trial: int
    config: UnlearnConfig
    options: Mapping[str, Any]
    """What was drawn or chosen: dotted overrides."""
    budget_unit: str
    budget: float
    rows: int | None = None
    """Rows of each set it is judged on, evenly spread; None: all."""

    def key(self, data: SplitData) -> str:
        """Digest of all that decides the result."""
        from ofmu_ray.metrics.functions import METRIC_VERSION

        run = [self.method, self.phase, str(self.trial), self.budget_unit, repr(self.budget), str(self.rows)]
        return config_hash(self.config, *run, str(METRIC_VERSION), data.fingerprint)

    @property
    def name(self) -> str:
        """For people."""
        number = f"seed {self.config.seed}" if self.phase != "tune" else str(self.trial)
        return f"{self.method} {self.split} {self.phase} {number}"


@dataclass(frozen=True, kw_only=True)
class TrialHooks:
    """What a sweep wants of its trials besides their result."""

    stages: int
    """Evaluations of a run, the last one at its end."""
    tracking: Any = None
    """MLflow run of the trial, for its series."""
    parent: str | None = None
    """Key of the trial whose weights and optimisers this one goes on from."""


def result_path(folder: str | Path, key: str) -> Path:
    """Where a finished run is written down; its rows lie beside it as Parquet."""
    return Path(folder) / "trials" / f"{key}.json"


def read_result(folder: str | Path, key: str) -> dict[str, Any] | None:
    """What `run_trial` wrote, or None."""
    path = result_path(folder, key)
    return json.loads(path.read_text()) if path.exists() else None


def model_path(folder: str | Path, key: str) -> Path:
    """Where the model of a finished trial lies, as long as it is kept."""
    return Path(folder) / "models" / key


def checkpoint_path(folder: str | Path, key: str) -> Path:
    """Where the checkpoints of a trial lie that others go on from."""
    return Path(folder) / "checkpoints" / key


def work_path(folder: str | Path, key: str) -> Path:
    """Where a trial's plan, checkpoints and stages lie while it runs."""
    return Path(folder) / "work" / key


def run_trial(trial: Trial, data: SplitData, *, local: bool, watch: TrialHooks | None = None) -> dict[str, Any]:
    """Run, evaluate, and write <folder>/trials/<key>.json whole, whatever happens; returns its content.

    `local`: in this process (engine torch, one worker); otherwise through Ray Train, from the driver. An exception is
    a result with status `failed`, so that one bad draw does not end a benchmark. With `watch` the model is kept
    (`model_path`), and so are the checkpoints of a run that was ended early (`checkpoint_path`).
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
    content = _written(trial, data, result | evaluations | total)
    shutil.rmtree(work, ignore_errors=True)  # last, so that a kill before it loses nothing
    return content


def published(work: Path) -> list[dict[str, Any]]:
    """The evaluations of a run on its way, oldest first."""
    return [json.loads(path.read_text()) for path in sorted((work / "stages").glob("*.json"))]


def write_failure(trial: Trial, data: SplitData, message: str) -> dict[str, Any]:
    """The result of a run that could not even fail by itself."""
    return _written(trial, data, {"status": "failed", "message": message, "total_seconds": 0.0})


def _written(trial: Trial, data: SplitData, result: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: getattr(trial, name) for name in ("method", "split", "phase", "trial", "budget_unit", "budget")}
    known |= {"seed": trial.config.seed, "options": dict(trial.options), "ended": time.time()}
    content: dict[str, Any] = _finite({**known, **result})
    atomic_write(result_path(data.folder, trial.key(data)), json.dumps(content, indent=1) + "\n")
    return content


def reason(error: BaseException) -> str:
    """One line about an exception, without the text of rows (which no exception of this project holds)."""
    mistake = user_error_within(error)
    if mistake is not None:
        return str(mistake)
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:300]}"


def _run(trial: Trial, data: SplitData, work: Path, local: bool, watch: TrialHooks | None) -> dict[str, Any]:
    from ofmu_ray.training.export import export_model
    from ofmu_ray.training.start import run_local

    clock = _Clock()
    job = job_of(trial, data, work)
    if watch is not None:
        job = replace(job, tracking=watch.tracking, stages=_stages(trial, data, work, watch.stages))
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
    account = summary["account"]
    found = {
        "status": summary["status"],
        "message": summary["message"],
        "rounds": summary["round"],
        "forget_passes": account["gradient_passes"]["forget"],
        "retain_passes": account["gradient_passes"]["retain"],
        "updates": account["updates"],
        "tokens": account["tokens"],
        "flops": account["flops"],
        "train_seconds": summary["train_seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }
    if trial.phase == "cost":
        found["mean_tokens"] = _mean_tokens(job.plan_dir)
        return found | _last_round(found, summary["series"]) | clock.laps
    if summary["status"] == "stopped":
        [last] = (work / "train").glob("*round_*_stopped")
        _move(last, checkpoint_path(data.folder, trial.key(data)))
    else:
        config = trial.config
        evaluation = data.evaluator.sampled(trial.rows, config.evaluation, config.seed)
        if local:  # in memory, nothing is exported; the worker does not go on
            table = evaluation.live_table(worker.module, worker.processor, trial.name)
        else:
            table = evaluation.table(str(work / "model"), trial.name)
        _keep_rows(table, result_path(data.folder, trial.key(data)).with_suffix(".parquet"))
        found["figures"] = evaluation.figures(table, data.retrained)
        clock.lap("evaluation_seconds")
        if watch is not None:
            if local:
                export_model(job, worker.engine, worker.module, worker.processor, worker.state, 0)
            _move(work / "model", model_path(data.folder, trial.key(data)))
    return found | clock.laps


def _last_round(found: Mapping[str, Any], series: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the last round cost by itself: finite differences measure their steps in the first one, which costs more."""
    if len(series) < 2:
        return {}
    names = ("forget_passes", "retain_passes")
    passes = {name: series[-1][name] - series[-2][name] for name in names}
    share = sum(passes.values()) / sum(found[name] for name in names)
    return {**passes, "rounds": 1, "flops": found["flops"] * share}


def _move(folder: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder, place)


def _stages(trial: Trial, data: SplitData, work: Path, count: int) -> Any:
    """Evaluations on the way, on the rows that the trial is judged on."""
    from ofmu_ray.training.stages import Stages

    config = trial.config
    evaluation = data.evaluator.sampled(trial.rows, config.evaluation, config.seed)
    return Stages(folder=str(work / "stages"), count=count, evaluation=evaluation, retrained=data.retrained)


def job_of(trial: Trial, data: SplitData, work: Path) -> WorkerJob:
    """The worker's job, its batch plan and what the method needs to know about rows written."""
    model = replace(trial.config.model, path=data.model.path, tokenizer=data.model.tokenizer)
    spec, cache = Spec.of(trial.config, model), str(data.evaluator.cache)
    job, plan = make_job(spec, data.prepared, str(work), cache, trial.key(data), here=True)
    return with_references(job, spec, data.prepared, plan, cache, private=str(Path(data.folder) / PRIVATE))


def _mean_tokens(plan_dir: str) -> dict[str, float]:
    """Mean tokens of the rows of each stream in a plan."""
    from ofmu_ray.data.batch_plan import read_plan
    from ofmu_ray.data.shard_files import read_pieces, shard_files

    plan = read_plan(plan_dir)
    tokens: dict[str, list[int]] = {name: [] for name in plan.streams}
    order = [name for name in plan.streams for _ in range(plan.batches_per_round[name] * plan.share)]
    for shard in range(plan.workers):
        for path in shard_files(plan, shard):
            for table in read_pieces(path):
                for position, ids in zip(table["position"].to_pylist(), table["input_ids"].to_pylist(), strict=True):
                    tokens[order[position % plan.rows_per_round]].append(len(ids))
    return {name: sum(found) / len(found) for name, found in tokens.items() if found}


# ------------------------------------------------------------------------------------------------------ evaluation


def _keep_rows(table: Any, path: Path) -> None:
    """Values by row beside the result, named as in the whole sets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    atomic_write(path, buffer.getvalue().to_pybytes())


def cost_signature(config: UnlearnConfig) -> dict[str, Any]:
    """What decides the cost of a round: the method's options, of real numbers only whether they are 0."""
    chosen = flatten(to_dict(config.method_options))
    rates = tuple(f"{name}." for name in config.method_options.optimizer_fields)
    return {
        name: bool(value) if isinstance(value, float) else value
        for name, value in chosen.items()
        if not name.startswith(rates)
    } | {"method": config.method}


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def _reset_peak() -> None:
    """Let the peak of this process's memory begin anew, so that a warm process does not report an earlier run's.

    The resident set still holds the interpreter and what the allocator keeps. Where Linux does not allow it (or on
    another system) the peak stays that of all runs of the process.
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
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
