"""Whether a sweep's trials have room: workers on the cluster's nodes, models on the disk. Counted before any starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ofmu_ray.config import ModelConfig, TrainingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.models.source import model_source

MOMENTS = 5
"""A checkpoint's size in model sizes: fp32 weights and two moments of each of two optimisers."""


def concurrency(training: TrainingConfig, asked: int | None, nodes: list[dict[str, float]] | None = None) -> int:
    """Trials at once: as many as have all their workers placed, at most `asked`.

    `nodes`: CPUs and GPUs by node; None: those of the cluster that this process has joined. A worker needs its CPUs
    and GPUs on one node. Tokenising and reference evaluations are done before the first trial, and the trials read
    prepared files, so that Ray Data takes no CPU from them.

    Raises:
        UserError: not even one trial fits, or `asked` do not.
    """
    from ofmu_ray.cluster.nodes import alive, room, share_words

    nodes = [dict(node.resources) for node in alive()] if nodes is None else nodes
    workers = room(nodes, training.cpus_per_worker, training.gpus_per_worker)
    found = workers // training.workers
    one = f"{training.workers} workers x {share_words(training.cpus_per_worker, training.gpus_per_worker)}"
    there = "; ".join(share_words(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
    if found < 1:
        raise UserError(
            f"base.training: a trial needs {one}, each worker on one node, but the nodes have {there}: room for "
            f"{workers} workers; lower base.training.workers or what one of them needs, or join a larger cluster"
        )
    if asked is not None and asked > found:
        raise UserError(
            f"concurrency = {asked}: {asked} trials x {one} have no room on nodes of {there}, which hold {found} at a "
            f"time; set --concurrency {found}, or leave it out"
        )
    return asked or found


def check_disk(model: ModelConfig, folder: Path, *, models: int, free: int | None = None) -> None:
    """The storage has room for the models that are kept and the checkpoints of a running trial.

    `free`: bytes; None: as the file system says.

    Raises:
        UserError: it has not.
    """
    path = Path(model_source(model.path))
    if not path.is_dir():
        return  # a model on the hub: its size is not known yet
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    needed = size * (models + 2 * MOMENTS)
    if free is None:
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"storage: {folder} has {_size(free)} free, but {models} models and a trial's checkpoints need about "
            f"{_size(needed)}; free some, choose another --storage, or lower --keep_models"
        )


def _size(count: Any) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
