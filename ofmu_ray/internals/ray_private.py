"""Private APIs of Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ofmu_ray.internals.contract import Private, check_attributes

_TRAIN = "ray.train.v2._internal"
_CHECKPOINTS = f"{_TRAIN}.execution.checkpoint.checkpoint_manager"
_LIST = "repairing a checkpoint list that a kill left truncated"
_UPLOAD = "packing the working directory by the rules of `ray job submit`"
_LOOPBACK = "a single-machine Ray that listens on 127.0.0.1 only"

TORCH_BACKEND = Private("ray.train.torch.config", "_TorchBackend", "a rendezvous of the workers on one interface")
SET_RANK_VARIABLES = Private("ray.train.torch.config", "_set_torch_distributed_env_vars", "RANK, WORLD_SIZE and so on")
STARTUP_FAILED = Private(
    f"{_TRAIN}.exceptions", "WorkerGroupStartupFailedError", "having Ray Train start workers again"
)
STARTUP_TIMEOUT = Private(f"{_TRAIN}.exceptions", "WorkerGroupStartupTimeoutError", "detecting a cluster without room")
SNAPSHOT_FILE = Private(f"{_TRAIN}.constants", "CHECKPOINT_MANAGER_SNAPSHOT_FILENAME", _LIST)
SNAPSHOT = Private(
    _CHECKPOINTS,
    "_CheckpointManagerState",
    _LIST,
    (
        "checkpoint_results",
        "checkpoint_report_indices",
        "latest_checkpoint_result",
        "pending_training_results",
        "pending_validation_specs",
        "current_report_index",
        "validated_checkpoint_dir_names",
        "timed_out_validation_checkpoint_dir_names",
        "failed_validation_checkpoint_dir_names",
    ),
)
SNAPSHOT_ENTRY = Private(_CHECKPOINTS, "_TrainingResultState", _LIST, ("checkpoint_dir_name", "metrics"))
INTERRUPTS = "_register_sigint_handler"
FREE_BY_NODE = Private("ray._private.state", "available_resources_per_node", "what is free on each node")
CONSTANTS = Private("ray._private", "ray_constants", _LOOPBACK)
CLUSTERS_VARIABLE = Private("ray._private.ray_constants", "ENABLE_RAY_CLUSTERS_ENV_VAR", _LOOPBACK)
CLUSTERS = Private("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", _LOOPBACK)
EXCLUDES = Private("ray._private.ray_constants", "get_runtime_env_default_excludes", _UPLOAD)
CREATE_PACKAGE = Private("ray._private.runtime_env.packaging", "create_package", _UPLOAD)
PACKAGE_LIMIT = Private("ray._private.runtime_env.packaging", "GCS_STORAGE_MAX_SIZE", "the largest upload, in bytes")


def leave_interrupts(trainer: Any) -> None:
    """Have Ctrl-C raise KeyboardInterrupt during `fit` and after it.

    Ray Train's handler ends the process with status 0 or 1, and stays when the trainer is done.
    """
    check_attributes("ray", trainer, [INTERRUPTS])
    setattr(trainer, INTERRUPTS, lambda controller: None)


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """What is free now (CPU, GPU, ...), by node id."""
    free: Mapping[str, Mapping[str, float]] = FREE_BY_NODE.get()()
    return free


@contextmanager
def loopback_only() -> Iterator[None]:
    """Make a Ray started in the block listen on 127.0.0.1, as on macOS; on Linux it would use all interfaces.

    Ray has no option for this: it replaces a node address of 127.0.0.1 by that of an interface, unless a variable
    declares a platform without clusters. Ray reads it at import, and so do the processes it starts.
    """
    constants, variable, before = CONSTANTS.get(), CLUSTERS_VARIABLE.get(), CLUSTERS.get()
    if variable in os.environ:  # the user has decided
        yield
        return
    constants.ENABLE_RAY_CLUSTER = False
    os.environ[variable] = "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        del os.environ[variable]


def checkpoint_list(folders: Sequence[str]) -> str:
    """Ray Train's JSON list of a run's checkpoints, oldest first."""
    entry = SNAPSHOT_ENTRY.get()
    results = [entry(checkpoint_dir_name=name, metrics={}) for name in folders]
    state = SNAPSHOT.get()(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(results))),
        latest_checkpoint_result=results[-1] if results else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    return str(state.json())


def pack(folder: Path, archive: Path, *, gitignore: bool, excludes: Sequence[str]) -> None:
    """Zip a folder without what Ray, `excludes` and, with `gitignore`, .gitignore files exclude."""
    excluded = [*EXCLUDES.get()(), *excludes]
    CREATE_PACKAGE.get()(str(folder.resolve()), archive, include_gitignore=gitignore, excludes=excluded)
