"""Export of the changed model as a Hugging Face directory, by one worker."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ofmu_ray.engines.protocol import Engine
from ofmu_ray.storage import atomic_dir, atomic_write
from ofmu_ray.training.checkpoint import LoopState
from ofmu_ray.training.job import WorkerJob

MAX_SHARD_SIZE = "5GB"


def export_model(
    job: WorkerJob, engine: Engine, module: torch.nn.Module, tokenizer: Any, state: LoopState, rank: int
) -> None:
    """Write <run>/model (safetensors, config, generation config, tokenizer) and <run>/training.json. Collective.

    Everything is written beside and moved into place, so a killed export leaves nothing half-written.
    """
    weights = engine.full_weights()
    if rank != 0:
        return
    assert weights is not None
    run = Path(job.run_dir)
    base: Any = module.get_base_model() if job.model.lora is not None else module  # type: ignore[operator]
    with atomic_dir(run / "model") as folder:
        base.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(folder)
    summary = asdict(state) | {"account": engine.account.state()}
    atomic_write(run / "training.json", json.dumps(summary) + "\n")
