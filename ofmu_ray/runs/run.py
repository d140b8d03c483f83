"""A run as one function: check, prepare, plan, precompute what the method needs, fit, evaluate, write.

It neither prints nor exits: progress goes to a listener (ofmu_ray.progress), user errors are raised as `UserError`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofmu_ray import progress
from ofmu_ray.config import ExportConfig, ModelConfig, TrainConfig, UnlearnConfig, outcome_hash
from ofmu_ray.errors import UserError
from ofmu_ray.models.checks import placed
from ofmu_ray.runs.claims import Claim
from ofmu_ray.runs.job import EVALUATED, REQUESTED, TOKENS, Spec, make_job, remove_text, with_references
from ofmu_ray.runs.outcome import Outcome, cost_of, read_trained, read_unlearned
from ofmu_ray.runs.preflight import (
    check_machine,
    check_method,
    check_sources,
    check_task_on_nodes,
    check_training,
    engine_of,
    needs_no_ray,
    prepare_storage,
    public,
)
from ofmu_ray.runs.who_evaluates import check_device_map, evaluates_live, evaluation_of
from ofmu_ray.runs.writing import RunResults
from ofmu_ray.storage import (
    atomic_write,
    drop_copies,
    explained,
    fetched,
    is_uri,
    is_whole,
    join,
    name_of,
    remove_folder,
)
from ofmu_ray.storage.hub_push import check_push, push
from ofmu_ray.tasks import task_named

if TYPE_CHECKING:
    from ofmu_ray.data.encoder import Encoder
    from ofmu_ray.tasks.protocol import Evaluation
    from ofmu_ray.training.live import LiveEvaluation
    from ofmu_ray.training.worker_job import WorkerJob


@dataclass
class Run:
    """A run in progress."""

    config: UnlearnConfig | TrainConfig
    storage: str
    digest: str
    """Hash of everything that determines the outcome."""
    command: Sequence[str] = ()
    """For the report and the manifest; empty if a Python program started the run."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase."""

    @property
    def kind(self) -> str:
        """`unlearn` or `train`."""
        return "train" if isinstance(self.config, TrainConfig) else "unlearn"

    @property
    def home(self) -> str:
        """<storage>/<name>, a folder or a URI."""
        prefix = "train" if isinstance(self.config, TrainConfig) else self.config.method
        return join(self.storage, self.config.name or f"{prefix}-{self.digest[:8]}")

    @property
    def claim(self) -> Claim:
        """What claims the run's name."""
        config = self.config
        sources = {"train": config.data.source} if isinstance(config, TrainConfig) else config.sources
        options = public(config)
        return Claim(self.home, self.kind, self.digest, options, config.overwrite, sources, config.data.root)

    def is_requested(self, stream: str) -> bool:
        """Whether a pipeline wrote the files of a stream for this run."""
        own = join(self.home, REQUESTED)
        return any(path.startswith(own) for path in self.claim.sources[stream].paths)

    def is_private(self, stream: str) -> bool:
        """Whether tokens of a stream go with the run: forget rows, and files that a pipeline wrote for this run."""
        return stream == "forget" or self.is_requested(stream)

    @cached_property
    def here(self) -> bool:
        """Whether the rounds run in this process, without Ray."""
        return needs_no_ray(self.config.training, self.home)

    def spec(self, model: ModelConfig) -> Spec:
        """What the workers are told of the configuration, for a model that all nodes find."""
        spec = Spec.of(self.config, model)
        return replace(spec, training=replace(spec.training, engine=engine_of(spec.training, self.home)))

    @property
    def cache(self) -> str:
        """Folder of the storage's caches."""
        return join(self.storage, "cache")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the run."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def run(
    config: UnlearnConfig | TrainConfig, listener: progress.Listener | None = None, command: Sequence[str] = ()
) -> Outcome:
    """Run to the end, or resume a killed run of the same name. A finished run is read, not repeated.

    Raises:
        UserError: a user's mistake, or the storage or cluster refuses; existing files are left untouched.
    """
    active_listener = progress.current() if listener is None else listener
    with progress.listening(active_listener), explained(config.storage):
        storage = prepare_storage(config.storage)
        config = replace(config, training=check_machine(config.training))
        this_run = as_begun(Run(config, storage, outcome_hash(config), command))
        config = this_run.config
        ours = this_run.claim.check()
        if config.export.push_to_hub is not None:
            check_push(config.export.push_to_hub, public=config.export.hub_public)
        if isinstance(config, TrainConfig):
            outcome = read_trained(this_run.home, reused=True) if ours else None
            outcome = outcome or _observed(this_run, lambda: _train(this_run, config))
        else:
            outcome = _finished(this_run, config) if ours else None
            outcome = outcome or _observed(this_run, lambda: _unlearn(this_run, config))
        return _pushed(outcome, config.export)


def as_begun(this_run: Run) -> Run:
    """The run; with `training.decay_norms` if it began before that option, when weight decay was for all parameters."""
    config = replace(this_run.config, training=replace(this_run.config.training, decay_norms=True))
    earlier = replace(this_run, config=config, digest=outcome_hash(config))
    return earlier if earlier.digest != this_run.digest and earlier.claim.began() else this_run


def _pushed(outcome: Outcome, export: ExportConfig) -> Outcome:
    if export.push_to_hub is None or not outcome.finished:
        return outcome
    folder = fetched(outcome.model, "storage") if is_uri(outcome.model) else Path(outcome.model)
    return replace(outcome, hub=push(folder, export.push_to_hub, public=export.hub_public))


def _observed(this_run: Run, work: Callable[[], Outcome]) -> Outcome:
    listener, outcome = progress.current(), None
    listener.started(this_run)
    try:
        outcome = work()
    finally:
        listener.ended(this_run, outcome)
    return outcome


@contextmanager
def _tracked(this_run: Run, tags: dict[str, str]) -> Iterator[Any]:
    """The MLflow run for a block; closed if the block raises."""
    from ofmu_ray import tracking

    config = this_run.config
    record = join(this_run.home, tracking.RECORD)
    name = name_of(this_run.home)
    handle = tracking.start(config.tracking, this_run.storage, name, public(config), tags, record=record)
    try:
        with tracking.system_metrics(handle, enabled=config.tracking.system_metrics):
            yield handle
    except KeyboardInterrupt:
        tracking.finish(handle, status="KILLED")
        raise
    except BaseException:
        tracking.finish(handle, status="FAILED")
        raise


# ----------------------------------------------------------------------------------------------------------- unlearn


def _finished(this_run: Run, config: UnlearnConfig) -> Outcome | None:
    """The outcome of a finished run, after sending MLflow what it did not take before; None: not finished."""
    from ofmu_ray import tracking

    outcome = read_unlearned(this_run.home, reused=True)
    if outcome is None:
        return None
    remove_folder(join(this_run.home, "train"))  # left over if killed at the very end
    done = tracking.deliver_late(this_run.home, config.tracking, this_run.storage)
    if done is not None:
        progress.note("mlflow", "has everything now" if done else "does not answer; the rest waits in the run's folder")
    return replace(outcome, delivered=done is not False)


def _unlearn(this_run: Run, config: UnlearnConfig) -> Outcome:
    from ofmu_ray.cluster.join import join_cluster, run_paths

    task = task_named(config.task)
    check_sources(config.data)
    check_method(task, config)
    processor = task.check_model(config.model)
    check_training(task, config)
    if config.evaluation.enabled and config.evaluation.retrained:
        task.check_model(ModelConfig(path=config.evaluation.retrained), "evaluation.retrained")
    encoder, evaluation = task.encoder(processor, config.data), evaluation_of(task, config, this_run.storage)
    tags = {"ofmu.kind": "unlearn", "ofmu.method": config.method, "ofmu.config_hash": this_run.digest}
    with this_run.claim.held():
        with _tracked(this_run, tags) as handle:
            with this_run.phase("start"):
                progress.note("run", this_run.home)
                if not this_run.here:
                    join_cluster(config.training, this_run.storage, run_paths(config))
                    check_task_on_nodes(config.task)
                check_device_map(config.evaluation)
            with _threads(this_run):
                results = _work(this_run, config, evaluation, encoder, handle)
        return _concluded(this_run, config, results, handle)


def _concluded(this_run: Run, config: UnlearnConfig, results: RunResults, handle: Any) -> Outcome:
    """Write everything, send it to MLflow, and remove what only a resumed run needs."""
    from ofmu_ray import tracking
    from ofmu_ray.runs import writing

    link = tracking.open_command(handle)
    files = writing.write(this_run.home, results, public(config), this_run.digest, this_run.command, link)
    status: Any = "FINISHED" if results.training["status"] == "finished" else "FAILED"
    delivered = tracking.conclude(this_run.home, handle, artifacts=files, status=status)
    if not delivered:
        text = f"did not take everything; the same command sends it the rest later, from {this_run.home}"
        progress.note("mlflow", text)
    remove_folder(join(this_run.home, "train"))  # the checkpoints
    drop_copies(join(this_run.home, "model"))
    outcome = read_unlearned(this_run.home, delivered=delivered)
    assert outcome is not None
    return outcome


def _work(this_run: Run, config: UnlearnConfig, evaluation: Evaluation, encoder: Encoder, handle: Any) -> RunResults:
    """Prepare the data, evaluate, run the rounds, evaluate again."""
    from ofmu_ray.data.prepare import prepare_streams
    from ofmu_ray.reporting.image_section import images_of

    with this_run.phase("data"):
        prepared = prepare_streams(
            config.sources,
            config.data.root,
            encoder,
            this_run.storage,
            private={name: join(this_run.home, TOKENS) for name in config.sources if this_run.is_private(name)},
            overlap=config.data.overlap,
            duplicates=config.data.duplicates,
            whole=config.data.whole,
            salted=[name for name in config.sources if this_run.is_requested(name)],
        )
        this_run.claim.note_sources(prepared.sources)
        digest = outcome_hash(config, *(stream.fingerprint for stream in prepared.streams.values()))
        spec = this_run.spec(placed(config.model))
        job, plan = make_job(spec, prepared, this_run.home, this_run.cache, digest)
    progress.note("data", _data_line(plan))
    for topic, text in job.method.remarks.items():
        progress.note(topic, text)
    with this_run.phase("reference"):
        job = with_references(replace(job, tracking=handle), spec, prepared, plan, this_run.cache)
    with this_run.phase("evaluation"):
        live, before = _live(this_run, config, spec, evaluation)
        if live is None:
            before = evaluation.table(config.model.path, "before")
        retrained = evaluation.table(config.evaluation.retrained, "retrained")
    with this_run.phase("training"):
        summary = _fit(this_run, replace(job, live=live))
    progress.note("train", f"{summary['round']} rounds, {summary['train_seconds']:.1f} s; {summary['status']}")
    if summary["message"]:
        progress.note("stop", summary["message"])
    with this_run.phase("evaluation"):
        if live is None:
            after = evaluation.table(join(this_run.home, "model"), "after")
        else:
            before = _of_workers(this_run, live, config.model.path, "before") if before is None else before
            after = _of_workers(this_run, live, join(this_run.home, "model"), "after")
        tables = {"before": before, "after": after, "retrained": retrained}
        metrics = {name: evaluation.figures(table, retrained) for name, table in tables.items()}
    return RunResults(
        training=summary,
        metrics=metrics,
        tables=tables,
        texts=evaluation.texts(),
        verdict=evaluation.verdict(tables, metrics),
        data=prepared.report.to_json(),
        seconds=this_run.seconds,
        plan=plan.fingerprint,
        images=images_of(evaluation, tables, config.report.samples),
    )


def _live(this_run: Run, config: UnlearnConfig, spec: Spec, evaluation: Any) -> tuple[LiveEvaluation | None, Any]:
    """What the workers evaluate (None: nothing), and the table of the model before if it is known."""
    if not evaluates_live(config, spec.training, evaluation):
        return None, None
    from ofmu_ray.training.live import LiveEvaluation

    live = LiveEvaluation(folder=join(this_run.home, EVALUATED), evaluation=evaluation, before=True)
    before = evaluation.stored(config.model.path)
    if before is None:
        before, _ = live.table("before")  # of a run that resumes
    progress.note("evaluation", f"by the run's workers ({spec.training.workers}), with the model that they hold")
    return replace(live, before=before is None), before


def _of_workers(this_run: Run, live: LiveEvaluation, model: str, label: str) -> Any:
    """A table of the workers; kept in the cache, where `ofmu evaluate` finds it."""
    evaluation: Any = live.evaluation
    table, seconds = live.table(label)
    if table is None:  # a run that was started with another evaluation.engine
        return evaluation.table(model, label)
    for phase, moved in (("training", -seconds), ("evaluation", seconds)):
        this_run.seconds[phase] = max(0.0, this_run.seconds[phase] + moved)
    if not is_uri(model):  # its fingerprint needs all of it on this machine
        evaluation.store(model, table)
    return table


@contextmanager
def _threads(this_run: Run) -> Iterator[None]:
    """Give torch a worker's number of threads for what runs in this process."""
    if not this_run.here:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(this_run.config.training.cpus_per_worker)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(this_run: Run, job: WorkerJob) -> dict[str, Any]:
    if this_run.here:
        from ofmu_ray.training.start import fit_here

        return fit_here(job, this_run.kind)
    from ofmu_ray.training.launch import fit

    return fit(job, this_run.kind)


def _data_line(plan: Any) -> str:
    streams = ", ".join(f"{name} {plan.rows[name]} rows ({plan.epochs[name]:.1f} epochs)" for name in plan.streams)
    return f"{streams}; {plan.rounds} rounds of " + " + ".join(
        f"{count} {name}" for name, count in plan.batches_per_round.items()
    )


# ------------------------------------------------------------------------------------------------------------- train


def _train(this_run: Run, config: TrainConfig) -> Outcome:
    if config.model is not None:
        task = task_named(config.task)
        task.check_model(config.model)
        check_training(task, config)
    with this_run.claim.held():
        return _fitted(this_run, config)


def _fitted(this_run: Run, config: TrainConfig) -> Outcome:
    from ofmu_ray import tracking
    from ofmu_ray.cluster.join import join_cluster, model_paths, source_paths
    from ofmu_ray.data.prepare import prepare_streams

    home = this_run.home
    task = task_named(config.task)
    model = config.model or _initial_model(task, config, home)
    encoder = task.encoder(task.check_model(model), config.data)
    with _tracked(this_run, {"ofmu.kind": "train"}) as handle:
        if not this_run.here:
            rows_at = source_paths("data.train", config.data.source, config.data.root)
            join_cluster(config.training, this_run.storage, model_paths(model) | rows_at)
            check_task_on_nodes(config.task)
        prepared = prepare_streams(
            {"train": config.data.source},
            config.data.root,
            encoder,
            this_run.storage,
            private={"train": join(home, TOKENS)},
            duplicates=config.data.duplicates,
            whole=config.data.whole,
        )
        this_run.claim.note_sources(prepared.sources)
        stream = prepared.streams["train"]
        rounds = max(1, math.ceil(config.epochs * len(stream.rows) / config.training.batch_size))
        progress.note("data", f"{len(stream.rows)} rows, {rounds} steps of {config.training.batch_size} rows")
        spec = this_run.spec(placed(model))
        spec = replace(spec, training=replace(spec.training, rounds=rounds))
        job, _ = make_job(spec, prepared, home, this_run.cache, outcome_hash(config, stream.fingerprint))
        with this_run.phase("training"), _threads(this_run):
            summary = _fit(this_run, replace(job, tracking=handle))
    status: Any = "FINISHED" if summary["status"] == "finished" else "FAILED"
    delivered = tracking.finish(handle, cost=_train_cost(summary), status=status)
    manifest = {"config": public(config), "config_hash": this_run.digest, "data": prepared.report.to_json()}
    atomic_write(join(home, "manifest.json"), json.dumps(manifest, indent=2) + "\n")
    if summary["status"] == "finished":
        remove_text(home)
        remove_folder(join(home, "train"))
    if summary["message"]:
        progress.note("stop", summary["message"])
    outcome = read_trained(home)
    assert outcome is not None
    return replace(outcome, delivered=delivered, cost=cost_of(summary, this_run.seconds))


def _train_cost(summary: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, Any] = summary["account"]
    return {name: summary[name] for name in ("train_seconds", "peak_memory_bytes")} | counts


def _initial_model(task: Any, config: TrainConfig, home: str) -> ModelConfig:
    """The task's model from scratch with seeded random weights, saved next to the run's model."""
    folder = join(home, "initial")
    if not hasattr(task, "initial"):
        raise UserError(f"model is not set, and task = {config.task!r} makes none from scratch: set --model.path")
    if not is_whole(folder):
        task.initial(folder, config)
    return ModelConfig(path=folder)
