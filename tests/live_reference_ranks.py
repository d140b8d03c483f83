"""Runs on two gloo ranks that share one model (ZeRO-3) and compute its reference values; tests/test_live_references.py
judges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from fault_ranks import FolderSession

from ofmu_ray.data.batch_plan import read_plan
from ofmu_ray.data.batches import local_rounds
from ofmu_ray.data.sidecar import has_table
from ofmu_ray.engines import deepspeed_engine
from ofmu_ray.models.answers import unwrapped
from ofmu_ray.tasks.causal_lm import CausalLM
from ofmu_ray.training import live_references
from ofmu_ray.training.worker import Worker
from ofmu_ray.training.worker_job import WorkerJob


class Killed(BaseException):
    """Ends a start as a kill would."""


@dataclass(frozen=True)
class Case:
    """A run; `killed`: first started and killed in its second table."""

    job: WorkerJob
    killed: bool = False

    def __str__(self) -> str:
        return Path(self.job.run_dir).name


def start(case: Case, rank: int, world: int) -> dict[str, Any]:
    """What rank 0 knows at the end of the run."""
    deepspeed_engine.PERSISTENT_BELOW = 0  # shard all parameters of this small model
    loaded: list[str] = []
    for kind, name in ((transformers.PreTrainedModel, "from_pretrained"), (CausalLM, "load")):
        setattr(kind, name, lambda *_, **__: loaded.append("whole"))
    job, session = case.job, FolderSession(case.job.run_dir, rank, world)
    kept = interrupted(job, session) if case.killed else {}
    worker = Worker(job, session)
    again = {folder: written(folder) for folder in kept}
    plan = read_plan(job.plan_dir)

    def source(at: int, options: dict[str, Any]) -> Iterator[Any]:
        yield from local_rounds(plan, rank, start_round=at, **options)

    worker.run(source)
    module: Any = unwrapped(worker.module)
    result = {
        "loaded": loaded,
        "kept": len(kept),
        "computed_again": again != kept,
        "series": worker.state.series,
        "level": getattr(worker.method, "level", None),
        "notes": worker.state.notes,
        "whole": [name for name, parameter in module.named_parameters() if parameter.numel()],
        "training": worker.module.training,
        "passes": worker.engine.account.gradient_passes,
    }
    worker.engine.close()  # type: ignore[attr-defined]
    return result


def interrupted(job: WorkerJob, session: FolderSession) -> dict[str, int]:
    """A start that all ranks leave in the second table; when each table was written until then."""
    together, begun = live_references._pass_by_pass, [0]

    def once(*arguments: Any) -> Iterator[Any]:
        begun[0] += 1
        for number, result in enumerate(together(*arguments)):
            if begun[0] == 2 and number == 1:
                raise Killed
            yield result

    live_references._pass_by_pass = once
    try:
        Worker(job, session)
    except Killed:
        pass
    finally:
        live_references._pass_by_pass = together
    dist.barrier()
    return {table.folder: written(table.folder) for table in job.references if has_table(table.folder)}


def written(folder: str) -> int:
    return Path(folder, "values.npy").stat().st_mtime_ns
