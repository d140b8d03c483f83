"""The engine of a job: one process's own, or DeepSpeed's."""

from __future__ import annotations

from typing import Any

import torch

from ofmu_ray.engines.compiled import CompiledLayers
from ofmu_ray.engines.protocol import Engine, Loss
from ofmu_ray.models.unread import UnreadWeights
from ofmu_ray.training.worker_job import WorkerJob


def build_engine(
    job: WorkerJob,
    module: torch.nn.Module,
    loss: Loss,
    device: torch.device,
    unread: UnreadWeights | None = None,
    compiled: CompiledLayers | None = None,
) -> Engine:
    """The engine of training.engine on a device; `loss`: the task's; `unread`: weights that it reads itself;
    `compiled`: replaces parts of its passes."""
    training = job.training
    inner, outer = job.method.optimizers
    if unread is None:
        module = module.to(device)
    else:
        unread.place(module, device)
    options: dict[str, Any] = {
        "loss_fn": loss,
        "inner": inner,
        "outer": outer,
        "precision": job.model.precision,
        "offload": training.offload,
        "decay_norms": training.decay_norms,
        "unread": unread,
        "compiled": compiled,
    }
    if training.single:
        from ofmu_ray.engines import TorchEngine

        return TorchEngine(module, **options)
    from ofmu_ray.engines import DeepSpeedEngine

    micro = training.micro_batch_size or training.batch_size // training.workers
    return DeepSpeedEngine(module, zero_stage=training.zero_stage, micro_batch_size=micro, **options)
