"""The driver's side: Ray started or joined, TorchTrainer set up, progress shown."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import ray
import yaml

from ofmu_ray import progress
from ofmu_ray.cluster.nodes import alive, here, on, room
from ofmu_ray.errors import UserError, user_error_within
from ofmu_ray.storage import is_uri, join, locate, read_text
from ofmu_ray.training.job import WorkerJob
from ofmu_ray.training.progress import Progress, Watch

WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "DS_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

LAUNCHER_FILE = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts its configuration on the head, for its own autoscaler."""
COLLECTIVE_TIMEOUT_SECONDS = 1800
"""Ray Train's own value."""
PLACING_SECONDS = 60.0
"""How long Ray Train waits for room before it looks at the cluster again; its own value."""


def connect(workers: int, cpus: float = 1.0, gpus: float = 0.0, patience: float = 1800.0) -> None:
    """Join the cluster of RAY_ADDRESS or of the submitted job; otherwise start Ray on this machine.

    `cpus`, `gpus`: what a worker needs on one node. `patience`: seconds that a cluster has to grow.

    Raises:
        UserError: there is no room for the workers.
    """
    needed = {"CPU": workers * cpus, "GPU": workers * gpus}
    # read by Ray Train when it is imported: how often the controller looks at its workers, and their output
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if not ray.is_initialized():
        local = "RAY_ADDRESS" not in os.environ and "RAY_JOB_ID" not in os.environ
        if local and needed["CPU"] > (os.cpu_count() or 1):
            raise _too_many("CPUs", needed["CPU"], os.cpu_count() or 1)
        if local:
            # no cloud takes this machine away with a notice: a process less to start
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # Ray would tell its makers about the machine and the libraries in use
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        given = _job_environment()
        environment = {"env_vars": {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in given}}
        with _loopback_only() if local else nullcontext():
            ray.init(
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env=environment,
            )
    launcher = _launcher()
    attainable = _attainable_resources(launcher)
    for name, amount in needed.items():
        if amount > attainable.get(name, 0):
            raise _too_many(f"{name}s", amount, attainable.get(name, 0))
    if _room(cpus, gpus) < workers:
        if launcher is None:
            raise UserError(
                f"training.workers = {workers}, each with {_words(cpus, gpus)} on one node, but the nodes have "
                f"{'; '.join(_words(n.resources.get('CPU', 0), n.resources.get('GPU', 0)) for n in alive())}: room for "
                f"{_room(cpus, gpus)}; lower what a worker needs, or join a larger cluster"
            )
        _grow(workers, cpus, gpus, patience)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that is started meanwhile listens on 127.0.0.1, as it does on macOS; on Linux it would on all interfaces.

    Ray has no option for it: it replaces 127.0.0.1 as a node's address by that of an interface unless told that this
    is a platform without clusters, by a variable that is read at import and by the processes it starts.
    """
    from ray._private import ray_constants

    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    if variable in os.environ:  # the user has decided
        yield
        return
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[variable] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[variable]


def _job_environment() -> dict[str, str]:
    """The variables that a submitted job's runtime environment sets; `ray.init` may not set one of them again."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    variables: dict[str, str] = job.get("runtime_env", {}).get("env_vars") or {}
    return variables


def _launcher() -> dict[str, Any] | None:
    """The configuration of the cluster launcher whose autoscaler starts nodes on demand; None: the cluster is as it is.

    Ray itself does not tell a driver how far a cluster can grow; `ray up` leaves its configuration on the head, where
    submitted jobs' drivers run.
    """
    path = Path(LAUNCHER_FILE).expanduser()
    if "RAY_ADDRESS" not in os.environ or not path.exists():
        return None
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def _attainable_resources(config: dict[str, Any] | None) -> dict[str, float]:
    """What the cluster has, or what it can grow to."""
    present: dict[str, float] = ray.cluster_resources()
    if config is None:
        return present
    largest: dict[str, float] = {}
    for name, node in config["available_node_types"].items():
        nodes = 1 if name == config["head_node_type"] else min(node["max_workers"], config["max_workers"])
        for resource, amount in node["resources"].items():
            largest[resource] = largest.get(resource, 0.0) + nodes * amount
    return {name: max(present.get(name, 0.0), largest.get(name, 0.0)) for name in present | largest}


def _room(cpus: float, gpus: float) -> int:
    return room((node.resources for node in alive()), cpus, gpus)


def _words(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")


def _grow(workers: int, cpus: float, gpus: float, patience: float) -> None:
    """Have the autoscaler start nodes until the cluster has room for the workers.

    Raises:
        UserError: they are not there in time.
    """
    from ray.autoscaler.sdk import request_resources

    progress.note("nodes", "waiting for the cluster to grow")
    end = time.monotonic() + patience
    bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    request_resources(bundles=[bundle] * workers)
    try:
        while _room(cpus, gpus) < workers:
            if time.monotonic() > end:
                raise UserError(
                    f"the cluster did not grow to room for training.workers = {workers} with {_words(cpus, gpus)} each "
                    f"within training.node_timeout = {patience:g} s; ask `ray status` on the head why"
                )
            time.sleep(1)
    finally:
        request_resources(bundles=[])  # the request would keep idle nodes for ever


def _too_many(what: str, needed: float, found: float) -> UserError:
    option = f"training.{what.lower()}_per_worker"
    return UserError(
        f"training.workers x {option} = {needed:g} {what}, but there are {found:g}: lower --training.workers or "
        f"--{option}, or join a larger cluster (RAY_ADDRESS)"
    )


def fit(job: WorkerJob, title: str) -> dict[str, Any]:
    """Run the workers to the end (resuming what the run's folder holds) and return <run>/training.json.

    Raises:
        UserError: a worker found a user's mistake, a worker's node does not see the run's files, or a lost node was
            not replaced in training.node_timeout.
        RuntimeError: the workers failed more than training.max_failures times.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ofmu_ray.cluster.rendezvous import OneInterface
    from ofmu_ray.cluster.shared_files import SharedFiles
    from ofmu_ray.training import registry
    from ofmu_ray.training.start import worker_loop

    if not is_uri(job.run_dir):  # an object is there or not, never torn
        registry.mend(Path(job.run_dir) / "train")
    training = job.training
    gpu = training.gpus_per_worker > 0
    resources = {"CPU": training.cpus_per_worker}
    if gpu:
        resources["GPU"] = training.gpus_per_worker
    threads = str(max(1, int(training.cpus_per_worker)))
    filesystem, inside = locate(job.run_dir)
    read: dict[str, list[str | None]] = {"model.path": [job.model.path], "model.tokenizer": [job.model.tokenizer]}
    shared = SharedFiles.of(job.run_dir, join(job.run_dir, "train"), read)
    actor = Progress.options(scheduling_strategy=on(here())).remote()  # type: ignore[attr-defined]
    # a collective must not give up before the watchdog, which says who was to blame
    patience = max(COLLECTIVE_TIMEOUT_SECONDS, ceil(training.round_timeout or 0) + 60)
    # both are Ray Train's: it asks so often, so long each time, whether there is room for all workers
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
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": threads}},
        ),
    )
    with Watch(actor, training.rounds, title):
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
    """What to tell when Ray Train has given up waiting for nodes."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    if not isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return None
    training = job.training
    found = _room(training.cpus_per_worker, training.gpus_per_worker)
    return UserError(
        f"training.workers = {training.workers}: in training.node_timeout = {training.node_timeout:g} s the cluster's "
        f"nodes came to have room for {found}; the same command takes the run up from its last checkpoint when there "
        "is room, or with fewer workers (--training.workers)"
    )
