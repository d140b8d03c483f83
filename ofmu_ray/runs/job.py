"""From prepared rows to the workers' job: the batch plan, the method's precomputed features, the job itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ofmu_ray.config import (
    DataConfig,
    ExportConfig,
    MethodConfig,
    ModelConfig,
    StopConfig,
    TrainConfig,
    TrainDataConfig,
    TrainingConfig,
    UnlearnConfig,
)
from ofmu_ray.progress import note
from ofmu_ray.storage import join, remove_file, remove_folder
from ofmu_ray.tasks import task_named

if TYPE_CHECKING:
    from ofmu_ray.data.batch_plan import Plan
    from ofmu_ray.data.prepare import PreparedData
    from ofmu_ray.features.value_tables import Missing
    from ofmu_ray.training.worker_job import WorkerJob

WATCHED = "watched.parquet"
PLAN = "plan"
SIDECARS = "sidecars"
TOKENS = "tokens"
EVALUATED = "evaluated"
REQUESTED = "requested"
"""Rows that a pipeline wrote for this run only."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a run does to a model, whichever command or trial starts it."""

    task: str
    method_name: str
    method: MethodConfig
    model: ModelConfig
    """As the workers find it (`preflight.placed`)."""
    training: TrainingConfig
    stop: StopConfig = field(default_factory=StopConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    seed: int = 0
    root: str | None = None
    """Base folder for relative paths of the method's own files."""
    data: DataConfig | TrainDataConfig | None = None
    """How rows are read."""

    @classmethod
    def of(cls, config: UnlearnConfig | TrainConfig, model: ModelConfig) -> Spec:
        """The spec of a command's configuration."""
        common: dict[str, Any] = {name: getattr(config, name) for name in ("task", "training", "export", "seed")}
        common |= {"model": model, "data": config.data}
        if isinstance(config, TrainConfig):
            return cls(method_name="finetune", method=config.finetune, root=config.data.root, **common)
        options = config.method_options
        return cls(method_name=config.method, method=options, stop=config.stop, root=config.data.root, **common)


def make_job(
    spec: Spec,
    prepared: PreparedData,
    folder: str,
    cache: str,
    config_hash: str,
    *,
    here: bool = False,
) -> tuple[WorkerJob, Plan]:
    """The workers' job without its sidecars (`with_references` adds them), and its plan, written to `folder`.

    Workers that share a model which may fit no device (ZeRO-3) compute what the method needs from it (`references`).

    Args:
        folder: the run's folder, for the plan and the watched rows.
        cache: folder of the storage's caches.
        config_hash: written into every checkpoint.
        here: write the plan in this process, whatever its size: a Ray Data job could wait forever for CPUs that a pool
            of trials occupies.
    """
    from ofmu_ray.data.batch_plan import write_plan
    from ofmu_ray.data.prepare import largest_tokens, write_sample
    from ofmu_ray.training.worker_job import WorkerJob

    check = getattr(task_named(spec.task), "check_rows", None)
    if check is not None:
        streams = prepared.streams
        check(spec.model, {name: one.longest for name, one in streams.items()}, largest_tokens(streams))
    watched = None
    if spec.stop.utility_floor is not None:
        watched = write_sample(prepared.streams["retain"], spec.stop.sample, join(folder, WATCHED))
    left: list[Missing] | None = [] if _share_a_model(spec.training) else None
    sized, remark = spec.method.sized(spec.method_name, lambda: trained_parameters(spec))
    if remark is not None:
        note("rate", remark)
    job = WorkerJob(
        run_dir=folder,
        plan_dir=join(folder, PLAN),
        config_hash=config_hash,
        seed=spec.seed,
        task=spec.task,
        model=spec.model,
        method=sized.completed(prepared, spec.model, cache, left),
        references=tuple(left or ()),
        training=spec.training,
        stop=spec.stop,
        export=spec.export,
        utility_rows=watched,
    )
    batches = job.build_method().batches_per_round()
    reading = getattr(task_named(spec.task), "reading", None)
    if reading is not None:
        streams = {name: prepared.streams[name] for name in batches}
        job = replace(job, reading=reading(streams, prepared.encoder, spec.data, spec.seed))
    plan = write_plan(
        prepared.streams,
        job.plan_dir,
        batches_per_round=batches,
        rounds=spec.training.rounds,
        batch_size=spec.training.batch_size,
        workers=spec.training.workers,
        seed=spec.seed,
        here=here,
    )
    return job, plan


def trained_parameters(spec: Spec) -> int | None:
    """Number of parameters that the method trains; None: the task does not tell before it has loaded the model."""
    from ofmu_ray.methods import build_method

    skeleton = task_named(spec.task).skeleton(spec.model)
    if skeleton is None:
        return None
    build_method(spec.method).freeze(skeleton)
    return sum(parameter.numel() for parameter in skeleton.parameters() if parameter.requires_grad)


def with_references(
    job: WorkerJob, spec: Spec, prepared: PreparedData, plan: Plan, cache: str, private: str | None = None
) -> WorkerJob:
    """The job, with what its method needs to know about the rows under the reference model.

    `private`: folder for tables that would reveal a forget row's text; None: the run's own.
    """
    from ofmu_ray.features.protocol import FeatureContext
    from ofmu_ray.features.reference import write_references

    left: list[Missing] | None = list(job.references) if _share_a_model(spec.training) else None
    sidecars = write_references(
        job.build_method().needs,
        prepared,
        plan,
        job.model,
        folder=join(job.run_dir, SIDECARS),
        cache=cache,
        private=private,
        settings=FeatureContext(spec.method_name, spec.root, spec.seed),
        left=left,
    )
    if left:
        titles = ", ".join(table.title for table in left)
        note("reference", f"{titles}: by the run's workers ({spec.training.workers}), with the model that they hold")
    return replace(job, sidecars=sidecars, references=tuple(left or ()))


def _share_a_model(training: TrainingConfig) -> bool:
    return training.workers > 1 and training.zero_stage == 3


def remove_text(folder: str) -> None:
    """Delete what must not outlive a run, as there is text in it: tokens, batch plan, sidecars, watched and requested
    rows, the workers' tables."""
    for name in (TOKENS, PLAN, SIDECARS, REQUESTED, EVALUATED):
        remove_folder(join(folder, name))
    remove_file(join(folder, WATCHED))
