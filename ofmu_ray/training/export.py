"""One worker exports the model as a directory that the task can load."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from ofmu_ray.engines.protocol import Engine
from ofmu_ray.storage import atomic_dir, atomic_write, join
from ofmu_ray.tasks import task_named
from ofmu_ray.training.checkpoint import LoopState
from ofmu_ray.training.worker_job import WorkerJob


def export_model(
    job: WorkerJob, engine: Engine, module: torch.nn.Module, processor: Any, state: LoopState, rank: int
) -> None:
    """Write <run>/model in the task's format and <run>/training.json. Collective.

    A killed export leaves nothing that looks like a model.
    """
    weights = engine.full_weights()
    if rank != 0:
        return
    assert weights is not None
    with atomic_dir(join(job.run_dir, "model")) as folder:
        task_named(job.task).export(module, processor, weights, folder)
    summary = asdict(state) | {"account": engine.account.state()}
    atomic_write(join(job.run_dir, "training.json"), json.dumps(summary) + "\n")
