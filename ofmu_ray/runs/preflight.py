"""Checks before any worker starts: the machine, the storage, the models."""

from __future__ import annotations

import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ofmu_ray import progress
from ofmu_ray.config import DataConfig, ModelConfig, TrainConfig, TrainingConfig, UnlearnConfig, to_dict
from ofmu_ray.config.training import resolved_engine
from ofmu_ray.errors import UserError
from ofmu_ray.runs.claims import recorded_options
from ofmu_ray.storage import (
    is_file,
    is_uri,
    join,
    local_path,
    locate,
    name_of,
    without_credentials,
)
from ofmu_ray.storage.local import nearest_existing
from ofmu_ray.storage.trouble import refusal
from ofmu_ray.training.checkpoint_list import RAY_TRAIN_LIST, local_checkpoints

if TYPE_CHECKING:
    from ofmu_ray.tasks.protocol import Evaluation, Task

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable that Ray sets only in the process of a submitted job."""
HEAD_SECONDS = 2
"""To connect to the head of a Ray cluster."""
GPU_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
"""Devices of NVIDIA, of AMD, and in Windows' subsystem; without them importing torch would take seconds."""
UPLOADS = "working_dir_files"
"""Ray's folder of unpacked working directories on a node."""


def prepare_storage(storage: str) -> str:
    """Check that files can be written, read and deleted in the storage; return its absolute path or URI.

    Raises:
        UserError: they cannot, or the URI contains credentials, which would be recorded with the run.
    """
    if is_uri(storage):
        _probe_store(storage)
        return storage
    return str(prepare_folder(storage))


def _probe_store(storage: str) -> None:
    shown = without_credentials(storage)
    if "@" in storage or any(f"{word}=" in storage for word in ("access_key", "secret_key", "session_token")):
        raise UserError(
            f"storage = {shown!r} contains credentials, and a storage's name is recorded in many places: pass them as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in a profile, or as a role of the nodes"
        )
    path = join(storage, f".writable.{uuid.uuid4().hex[:12]}")
    filesystem, inside = locate(path, wait=False)
    try:
        with filesystem.open_output_stream(inside) as file:
            file.write(b"OFMU")
        with filesystem.open_input_stream(inside) as file:
            file.readall()
        filesystem.delete_file(inside)
    except OSError as error:
        reason = refusal(error) or f"not writable ({error})"
        raise UserError(f"storage = {shown!r}: {reason}") from None


def prepare_folder(storage: str) -> Path:
    """The storage as a folder, absolute and writable, for commands that need one. It may not exist yet."""
    if is_uri(storage):
        raise UserError(
            f"storage = {without_credentials(storage)!r}: this command needs a folder that all nodes share (NFS, EFS, "
            "Filestore, Lustre); `ofmu unlearn`, `train` and `evaluate` take URIs, and data and models may be at one"
        )
    path = local_path(storage)
    if JOB_VARIABLE in os.environ:
        check_job_storage(storage)
    try:
        tempfile.TemporaryFile(dir=nearest_existing(path)).close()
    except OSError as error:
        raise UserError(
            f"storage = {storage!r}: not writable ({error.strerror}); choose another folder with --storage"
        ) from None
    return path


def check_job_storage(storage: str) -> None:
    """Refuse a storage in a submitted job's own folder, a copy of the upload that Ray removes after the job.

    Raises:
        UserError: `storage` is relative, or inside the job's own working directory.
    """
    if is_uri(storage):
        return
    text = os.path.expanduser(storage.removeprefix("file://"))
    upload = next((path for path in (Path.cwd(), *Path.cwd().parents) if path.parent.name == UPLOADS), None)
    inside = upload is not None and local_path(storage).is_relative_to(upload)
    if inside or not os.path.isabs(text):
        raise UserError(
            f"storage = {storage!r}: a submitted job's own folder is removed with everything written there; name the "
            "folder that all nodes share by its absolute path (--storage /mnt/...), or a URI (s3://, gs://)"
        )


def engine_of(training: TrainingConfig, home: str) -> Literal["torch", "deepspeed"]:
    """The engine of a run: training.engine, where `auto` keeps to what wrote the checkpoints of this name.

    One worker of Ray Train may have either: torch if it began alone, deepspeed if there were several workers before or
    the run is older than `auto`.
    """
    if training.engine == "auto" and is_file(join(home, "train", RAY_TRAIN_LIST)):
        begun = recorded_options(home).get("training") or {"engine": "deepspeed"}
        words = begun.get("engine", "deepspeed"), begun.get("workers", 1), begun.get("offload", "none")
        if resolved_engine(*words) == "deepspeed":
            return "deepspeed"
    return "torch" if training.single else "deepspeed"


def needs_no_ray(training: TrainingConfig, home: str) -> bool:
    """Whether the rounds run in this process, without Ray: one worker with the engine torch, on this machine.

    Not in a submitted job or if RAY_ADDRESS names a cluster, whose nodes have the CPUs; not with a storage at a URI,
    which Ray Train writes checkpoints to; and not if Ray Train started the run.

    Raises:
        UserError: this process's checkpoints are there, but Ray Train, which does not read them, would resume the run.
    """
    train = Path(home) / "train"
    if is_uri(home) or (train / RAY_TRAIN_LIST).is_file():
        return False
    cluster = "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ
    here = training.single and not cluster
    if not here and local_checkpoints(train):
        raise UserError(
            f"name = {name_of(home)!r}: this run was started by one worker without Ray: resume it with "
            "--training.workers 1, without RAY_ADDRESS, or choose another --name"
        )
    return here


def wants_ray() -> bool:
    """Whether work without workers joins or starts Ray at once: a cluster is given, or there are several GPUs here.

    Otherwise `map_tasks` starts it for what is too much for this process, and a cache is read without it.
    """
    from ofmu_ray.cluster.map_tasks import running_ray

    given = "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ or running_ray() is not None
    return given or _gpus_here() > 1


def public(config: Any) -> dict[str, Any]:
    """A configuration that MLflow, manifest, report and model card may show: URIs without user, password and query."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cleaned(item) for item in value]
        return without_credentials(value) if isinstance(value, str) and is_uri(value) else value

    content: dict[str, Any] = cleaned(to_dict(config))
    content.pop("overwrite", None)  # about the start, not the run
    return content


def check_machine(training: TrainingConfig) -> TrainingConfig:
    """Check what the workers need, before Ray starts here or joins a cluster.

    Returns the options with training.gpus_per_worker as a number. For `auto` this joins a cluster at RAY_ADDRESS.

    Raises:
        UserError: this machine has too few CPUs or no GPU, or no Ray head answers at RAY_ADDRESS.
    """
    if "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ:
        _check_head(os.environ.get("RAY_ADDRESS", ""))
        # the cluster's other resources are counted once it is joined (ofmu_ray.cluster.connect)
        return _with_gpus(training, _gpus_of_cluster) if training.gpus_per_worker == "auto" else training
    needed, available = training.workers * training.cpus_per_worker, os.cpu_count() or 1
    if needed > available:
        raise UserError(
            f"training.workers x training.cpus_per_worker = {training.workers} x {training.cpus_per_worker:g} = "
            f"{needed:g} CPUs, but this machine has {available}: lower one of them, or join a cluster (RAY_ADDRESS)"
        )
    if training.gpus:
        _check_gpus(training.workers * training.gpus)
    return _with_gpus(training, _gpus_here, _gpu_files()) if training.gpus_per_worker == "auto" else training


def _with_gpus(training: TrainingConfig, count: Callable[[], int], files: Sequence[str] = ()) -> TrainingConfig:
    """Resolves `auto`, and says so where there are GPUs, or `files` of them that torch makes nothing of."""
    available = count()
    used = available >= training.workers
    if used:
        more = f"; --training.workers {available} uses all" if available > training.workers else ""
        progress.note("gpu", f"{training.workers} of {available} GPUs{more}")
    elif not available and files:
        remedy = "install a build of torch for these GPUs, and check their driver"
        progress.note("gpu", f"torch finds none, although there is {files[0]}: the run uses CPUs; {remedy}")
    elif available:
        few = f"{available} GPUs for training.workers = {training.workers}: the run uses CPUs"
        progress.note("gpu", f"{few}; --training.workers {available} uses the GPUs")
    return replace(training, gpus_per_worker=float(used))


def _gpus_here() -> int:
    if not _gpu_files():
        return 0
    import torch

    return torch.cuda.device_count()


def _gpu_files() -> list[str]:
    """Devices that the user has not hidden from torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    return sorted(path for pattern in GPU_FILES for path in glob(pattern))


def _gpus_of_cluster() -> int:
    from ofmu_ray.cluster.connect import attainable

    return int(attainable().get("GPU", 0))


def _check_gpus(needed: float) -> None:
    available = _gpus_here()
    if needed > available:
        raise UserError(
            f"training.workers x training.gpus_per_worker = {needed:g} GPUs, but torch finds {available or 'none'} on "
            "this machine: set --training.gpus_per_worker 0 for CPUs, or join a cluster (RAY_ADDRESS)"
        )


def _check_head(address: str) -> None:
    """Ray itself waits for minutes."""
    host, _, port = address.rpartition("://")[2].split("/")[0].rpartition(":")
    if not host or not port.isdigit():
        return  # auto, local
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS = {address!r}: no Ray head answers there ({error}); start it, correct the address, or unset "
            "RAY_ADDRESS to run on this machine"
        ) from None


KINDS = {"answers": "a language model", "texts": "a language model", "classes": "a classifier"}
"""What offers what methods ask for."""


def check_early(task: Task, config: UnlearnConfig | TrainConfig) -> None:
    """Refuse what shows before torch is imported: models that are not there, names and layers that they do not have.

    Raises:
        UserError: names the option.
    """
    check = getattr(task, "check_early", None)
    if check is None or config.model is None:
        return
    if isinstance(config, TrainConfig):
        check(config.model, "model.path", {})
        return
    layer = getattr(config.method_options, "layer", None)
    check(config.model, "model.path", {} if layer is None else {f"{config.method}.layer": layer})
    for option, path in other_models(config).items():
        check(ModelConfig(path=path), option, {})


def other_models(config: UnlearnConfig) -> dict[str, str]:
    """Option -> path of each model that is read besides the one to change."""
    retrained = config.evaluation.retrained if config.evaluation.enabled else None
    return ({"evaluation.retrained": retrained} if retrained else {}) | config.method_options.models


def check_method(task: Task, config: UnlearnConfig) -> None:
    """Raise UserError if the method's losses need what the task does not have, or its SGD has no learning rate."""
    from ofmu_ray.features.protocol import Tokens
    from ofmu_ray.methods import build_method

    config.method_options.check_rates(config.method)
    method = build_method(config.method_options)
    for need in method.needs:
        if isinstance(need.feature, Tokens) and config.data.kind(need.stream) == "text":
            raise UserError(
                f"method = {config.method} gives questions other answers, but data.{need.stream} has texts "
                "(kind = text): choose another method, or questions with answers"
            )
    missing = method.asks - task.offers
    if missing:
        forget_loss = getattr(config.method_options, "forget_loss", None)
        loss = f" with {config.method}.forget_loss = {forget_loss}" if forget_loss else ""
        words = ", ".join(f"{name} of {KINDS[name]}" for name in sorted(missing))
        raise UserError(
            f"method = {config.method}{loss} needs {words}, which task = {config.task!r} does not have: choose another "
            "method, or for ofmu --ofmu.forget_loss nll"
        )


def check_training(task: Task, config: UnlearnConfig | TrainConfig) -> None:
    """Raise UserError if adapters, frozen parameters or the method's layers do not fit the model."""
    from ofmu_ray.methods import build_method

    if config.model is None:
        return
    skeleton = task.skeleton(config.model)
    if skeleton is not None:
        build_method(config.method_options if isinstance(config, UnlearnConfig) else config.finetune).freeze(skeleton)


def check_evaluation(evaluation: Evaluation, config: UnlearnConfig) -> None:
    """Raise UserError if the evaluation's rows do not fit the model, or the retrained one."""
    check = getattr(evaluation, "check_fits", None)
    if check is None or not config.evaluation.enabled:
        return
    check(config.model.path, "model.path")
    if config.evaluation.retrained:
        check(config.evaluation.retrained, "evaluation.retrained")


def check_task_on_nodes(name: str) -> None:
    """Raise UserError if processes on some node cannot import the task's module. Ray must be up."""
    from ofmu_ray.cluster.nodes import alive, on_each
    from ofmu_ray.tasks import importable, is_builtin

    if is_builtin(name):
        return
    answers = on_each(alive(), importable, name)
    missing = [node.address for node, answer in answers.items() if answer is not True]
    if missing:
        raise UserError(
            f"task = {name!r}: processes on {', '.join(missing)} cannot import it; install the module there, or put "
            "its folder on PYTHONPATH before Ray starts (for a submitted job: env_vars in runtime_env.yaml)"
        )


def check_sources(data: DataConfig) -> None:
    """Check that the sources exist and differ; their rows are checked when they are tokenised."""
    from ofmu_ray.data import sources

    named = data.sources
    if named["forget"] == named["retain"] and data.forget.paths and data.overlap != "allow":
        raise UserError(
            f"data.forget and data.retain are the same rows ({data.forget.shown}): name what the model should keep "
            "with --data.retain.path"
        )
    for name, source in data.sources.items():
        sources.fragments(source, data.root, stream=name, option=f"data.{name}")
