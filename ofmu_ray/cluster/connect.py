"""Join or start Ray, with room for the workers."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import yaml

from ofmu_ray import progress
from ofmu_ray.cluster.nodes import alive, cluster_room, share_words
from ofmu_ray.errors import StartError, UserError
from ofmu_ray.internals.ray_private import loopback_only

WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "DS_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment of every process that we start."""
LAUNCHER_FILE = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts its configuration on the head, for its autoscaler."""


def connect(workers: int, cpus: float = 1.0, gpus: float = 0.0, patience: float = 1800.0) -> None:
    """Join the cluster of RAY_ADDRESS or of the submitted job; otherwise start Ray on this machine.

    `cpus`, `gpus`: what a worker needs on one node. `patience`: seconds to wait for the cluster to grow.

    Raises:
        UserError: there is no room for the workers.
    """
    needed = {"CPU": workers * cpus, "GPU": workers * gpus}
    _start(needed["CPU"])
    launcher = _launcher()
    resources = _attainable_resources(launcher)
    for name, amount in needed.items():
        if amount > resources.get(name, 0):
            raise _too_many(f"{name}s", amount, resources.get(name, 0))
    if cluster_room(cpus, gpus) < workers:
        if launcher is None:
            present = "; ".join(share_words(n.resources.get("CPU", 0), n.resources.get("GPU", 0)) for n in alive())
            raise UserError(
                f"training.workers = {workers}, each with {share_words(cpus, gpus)} on one node, but the nodes have "
                f"{present}: room for {cluster_room(cpus, gpus)}; lower what a worker needs, or join a larger cluster"
            )
        _grow(workers, cpus, gpus, patience)


def attainable() -> dict[str, float]:
    """Resources of the cluster of RAY_ADDRESS or of the submitted job, grown as far as it can; joins it."""
    _start(0)
    return _attainable_resources(_launcher())


def _start(cpus: float) -> None:
    """Join the cluster, or start Ray on this machine, which must have `cpus` CPUs."""
    # Ray Train reads these on import: how often the controller polls its workers, and their output
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if not ray.is_initialized():
        local = "RAY_ADDRESS" not in os.environ and "RAY_JOB_ID" not in os.environ
        if local and cpus > (os.cpu_count() or 1):
            raise _too_many("CPUs", cpus, os.cpu_count() or 1)
        if local:
            # no cloud preempts this machine: one process less to start
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # otherwise Ray reports the machine and its libraries to its vendor
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        given = _job_environment()
        environment = {"env_vars": {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in given}}
        with loopback_only() if local else nullcontext():
            try:
                ray.init(
                    include_dashboard=False if local else None,
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env=environment,
                )
            except Exception as error:  # Ray raises no other kind
                if "timed out during startup" not in str(error):
                    raise
                raise StartError(
                    "Ray did not start on this machine in time: it is too busy or short of memory; the same command "
                    "tries again, and `ofmu unlearn` with one worker and --training.engine torch needs no Ray"
                ) from error


def worker_environment(cpus: float) -> dict[str, str]:
    """Environment of a process with `cpus` CPUs: one thread per CPU."""
    return WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": str(max(1, int(cpus)))}


def _job_environment() -> dict[str, str]:
    """Variables from a submitted job's runtime environment; `ray.init` must not set them again."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    variables: dict[str, str] = job.get("runtime_env", {}).get("env_vars") or {}
    return variables


def _launcher() -> dict[str, Any] | None:
    """The configuration of the cluster launcher whose autoscaler starts nodes on demand; None: the cluster is fixed.

    Ray does not report how far a cluster can grow, but `ray up` leaves its configuration on the head, where the drivers
    of submitted jobs run.
    """
    path = Path(LAUNCHER_FILE).expanduser()
    if "RAY_ADDRESS" not in os.environ or not path.exists():
        return None
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def _attainable_resources(config: dict[str, Any] | None) -> dict[str, float]:
    """The cluster's resources, after it has grown as far as it can."""
    present: dict[str, float] = ray.cluster_resources()
    if config is None:
        return present
    largest: dict[str, float] = {}
    for name, node in config["available_node_types"].items():
        nodes = 1 if name == config["head_node_type"] else min(node["max_workers"], config["max_workers"])
        for resource, amount in node["resources"].items():
            largest[resource] = largest.get(resource, 0.0) + nodes * amount
    return {name: max(present.get(name, 0.0), largest.get(name, 0.0)) for name in present | largest}


def _grow(workers: int, cpus: float, gpus: float, patience: float) -> None:
    """Let the autoscaler start nodes until the cluster has room for the workers.

    Raises:
        UserError: the nodes do not start in time.
    """
    from ray.autoscaler.sdk import request_resources

    progress.note("nodes", "waiting for the cluster to grow")
    end = time.monotonic() + patience
    bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    request_resources(bundles=[bundle] * workers)
    try:
        while cluster_room(cpus, gpus) < workers:
            if time.monotonic() > end:
                raise UserError(
                    f"the cluster did not grow to fit training.workers = {workers} with {share_words(cpus, gpus)} "
                    f"each within training.node_timeout = {patience:g} s; see `ray status` on the head"
                )
            time.sleep(1)
    finally:
        request_resources(bundles=[])  # otherwise the request keeps idle nodes forever


def _too_many(what: str, needed: float, available: float) -> UserError:
    option = f"training.{what.lower()}_per_worker"
    return UserError(
        f"training.workers x {option} = {needed:g} {what}, but there are {available:g}: lower --training.workers or "
        f"--{option}, or join a larger cluster (RAY_ADDRESS)"
    )
