"""Export of the changed model as a Hugging Face directory, by one worker."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from ofmu_ray.engines.protocol import Engine
from ofmu_ray.storage import atomic_dir, atomic_write, join
from ofmu_ray.training.checkpoint import LoopState
from ofmu_ray.training.job import WorkerJob

MAX_SHARD_SIZE = "5GB"


def export_model(
    job: WorkerJob, engine: Engine, module: torch.nn.Module, tokenizer: Any, state: LoopState, rank: int
) -> None:
    """Write <run>/model (safetensors, config, generation config, tokenizer) and <run>/training.json. Collective.

    A killed export leaves nothing that a reader would take for a model.
    """
    weights = engine.full_weights()
    if rank != 0:
        return
    assert weights is not None
    base: Any = module.get_base_model() if job.model.lora is not None else module  # type: ignore[operator]
    with atomic_dir(join(job.run_dir, "model")) as folder:
        base.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(folder)
    summary = asdict(state) | {"account": engine.account.state()}
    atomic_write(join(job.run_dir, "training.json"), json.dumps(summary) + "\n")
