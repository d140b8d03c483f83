"""One worker exports the model as a directory that the task can load."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from ofmu_ray.engines.protocol import Engine
from ofmu_ray.storage import atomic_write, join, new_folder
from ofmu_ray.tasks import task_named
from ofmu_ray.training.checkpoint import LoopState
from ofmu_ray.training.worker_job import WorkerJob


def export_model(
    job: WorkerJob, engine: Engine, module: torch.nn.Module, processor: Any, state: LoopState, rank: int
) -> None:
    """Write <run>/model in the task's format and <run>/training.json. Collective.

    A killed export leaves nothing that looks like a model.
    """
    with new_folder(join(job.run_dir, "model")) if rank == 0 else nullcontext() as folder:
        weights = engine.readable_weights()
        task_named(job.task).export(module, processor, weights, folder, job.model, job.export)
    if rank != 0:
        return
    summary = asdict(state) | {"account": engine.account.state()}
    atomic_write(join(job.run_dir, "training.json"), json.dumps(summary) + "\n")
