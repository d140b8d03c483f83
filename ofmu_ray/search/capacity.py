"""Whether a sweep's trials fit: workers on the cluster's nodes, models on disk. Checked before any trial starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ofmu_ray.config import ModelConfig, TrainingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.models.source import model_source
from ofmu_ray.storage.local import nearest_existing

MOMENTS = 5
"""A checkpoint's size in model sizes: fp32 weights, plus two moments for each of two optimisers."""


def concurrency(training: TrainingConfig, requested: int | None, nodes: list[dict[str, float]] | None = None) -> int:
    """Number of concurrent trials: as many as fit with all their workers, at most `requested`.

    `nodes`: CPUs and GPUs by node; None: those of the cluster that this process has joined. A worker needs its CPUs
    and GPUs on one node. Tokenising and reference evaluations are done before the first trial, and trials read
    prepared files, so Ray Data takes no CPU from them.

    Raises:
        UserError: not even one trial fits, or `requested` trials do not.
    """
    from ofmu_ray.cluster.nodes import alive, room, share_words

    nodes = [dict(node.resources) for node in alive()] if nodes is None else nodes
    workers = room(nodes, training.cpus_per_worker, training.gpus)
    fitting = workers // training.workers
    one = f"{training.workers} workers x {share_words(training.cpus_per_worker, training.gpus)}"
    available = "; ".join(share_words(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
    if fitting < 1:
        raise UserError(
            f"base.training: a trial needs {one}, each worker on one node, but the nodes have {available}: room for "
            f"{workers} workers; lower base.training.workers or the resources per worker, or join a larger cluster"
        )
    if requested is not None and requested > fitting:
        raise UserError(
            f"concurrency = {requested}: {requested} trials x {one} do not fit on nodes of {available}, "
            f"which have room for {fitting} at a time; set --concurrency {fitting}, or omit it"
        )
    return requested or fitting


def check_disk(model: ModelConfig, folder: Path, *, models: int, free: int | None = None) -> None:
    """Check that the storage has room for the kept models and the checkpoints of a running trial.

    `free`: bytes; None: as the file system reports.

    Raises:
        UserError: there is not enough room.
    """
    path = Path(model_source(model.path))
    if not path.is_dir():
        return  # a model on the hub: its size is not known yet
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    needed = size * (models + 2 * MOMENTS)
    if free is None:
        free = shutil.disk_usage(nearest_existing(folder)).free
    if needed > free:
        raise UserError(
            f"storage: {folder} has {_size(free)} free, but {models} models and a trial's checkpoints need about "
            f"{_size(needed)}; free some, choose another --storage, or lower --keep_models"
        )


def _size(count: Any) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
