"""The driver's side: sets up TorchTrainer and shows progress."""

from __future__ import annotations

import json
import os
from math import ceil
from pathlib import Path
from typing import Any

from ofmu_ray.cluster.connect import worker_environment
from ofmu_ray.cluster.nodes import cluster_room, here, on
from ofmu_ray.errors import UserError, user_error_within
from ofmu_ray.internals.ray_private import STARTUP_TIMEOUT, leave_interrupts
from ofmu_ray.storage import is_uri, join, locate, read_text
from ofmu_ray.training.watch import Progress, ProgressForwarder
from ofmu_ray.training.worker_job import WorkerJob

COLLECTIVE_TIMEOUT_SECONDS = 1800
"""Ray Train's default."""
PLACING_SECONDS = 60.0
"""How long Ray Train waits for resources before it checks the cluster again; its default."""


def fit(job: WorkerJob, title: str) -> dict[str, Any]:
    """Run the workers to the end (resuming from the run's folder) and return <run>/training.json.

    Raises:
        UserError: a worker raised one, a worker's node cannot access the run's files, or a lost node was not replaced
            within training.node_timeout.
        RuntimeError: the workers failed more than training.max_failures times.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ofmu_ray.cluster.rendezvous import OneInterface
    from ofmu_ray.cluster.shared_files import SharedFiles
    from ofmu_ray.training import checkpoint_list
    from ofmu_ray.training.start import worker_loop

    if not is_uri(job.run_dir):  # objects are never truncated
        checkpoint_list.mend(Path(job.run_dir) / "train")
    training = job.training
    gpu = training.gpus > 0
    resources = {"CPU": training.cpus_per_worker}
    if gpu:
        resources["GPU"] = training.gpus
    filesystem, inside = locate(job.run_dir)
    read: dict[str, list[str | None]] = {"model.path": [job.model.path], "model.tokenizer": [job.model.tokenizer]}
    shared = SharedFiles.of(job.run_dir, join(job.run_dir, "train"), read)
    actor = Progress.options(scheduling_strategy=on(here())).remote()  # type: ignore[attr-defined]
    # collectives must not time out before the watchdog, which names the culprit
    patience = max(COLLECTIVE_TIMEOUT_SECONDS, ceil(training.round_timeout or 0) + 60)
    # Ray Train retries to place all workers this often, waiting this long each time
    placing = min(PLACING_SECONDS, training.node_timeout)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{placing:g}"
    attempts = ceil(training.node_timeout / placing)
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"job": job, "progress": actor},
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=gpu,
            resources_per_worker=resources,
            placement_strategy=training.placement.upper(),
        ),
        torch_config=OneInterface(
            backend="nccl" if gpu else "gloo",
            timeout_s=patience,
            interface=training.network_interface,
            shared=shared,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=inside,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=training.keep_checkpoints),
            failure_config=FailureConfig(
                max_failures=training.max_failures, controller_failure_limit=max(0, attempts - 1)
            ),
            worker_runtime_env={"env_vars": worker_environment(training.cpus_per_worker)},
        ),
    )
    leave_interrupts(trainer)
    with ProgressForwarder(actor, training.rounds, title):
        try:
            trainer.fit()
        except Exception as error:
            mistake = user_error_within(error) or _no_room(error, job)
            if mistake is not None:
                raise mistake from None
            raise
    summary: dict[str, Any] = json.loads(read_text(join(job.run_dir, "training.json")))
    return summary


def _no_room(error: Exception, job: WorkerJob) -> UserError | None:
    """The error after Ray Train gave up waiting for nodes."""
    if not isinstance(getattr(error, "controller_failure", None), STARTUP_TIMEOUT.get()):
        return None
    training = job.training
    room = cluster_room(training.cpus_per_worker, training.gpus)
    return UserError(
        f"training.workers = {training.workers}: the cluster's nodes had room for {room} in training.node_timeout = "
        f"{training.node_timeout:g} s; the same command resumes from the last checkpoint once there is room, or with "
        "fewer workers (--training.workers)"
    )
