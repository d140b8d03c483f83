"""`ofmu unlearn`: prepare, precompute what the method needs, fit, evaluate, write."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ofmu_ray import progress
from ofmu_ray.config import ModelConfig, UnlearnConfig, outcome_hash, to_dict
from ofmu_ray.models.checks import placed
from ofmu_ray.runs.claims import recorded_options
from ofmu_ray.runs.job import EVALUATED, TOKENS, Spec, make_job, with_references
from ofmu_ray.runs.outcome import Outcome, read_unlearned
from ofmu_ray.runs.preflight import (
    check_early,
    check_evaluation,
    check_method,
    check_sources,
    check_task_on_nodes,
    check_training,
    other_models,
    public,
)
from ofmu_ray.runs.this_run import Run, fit_rounds, threads, tracked
from ofmu_ray.runs.who_evaluates import check_device_map, evaluates_live, evaluation_of
from ofmu_ray.runs.writing import RunResults
from ofmu_ray.storage import drop_copies, is_uri, join, remove_folder
from ofmu_ray.tasks import task_named

if TYPE_CHECKING:
    from ofmu_ray.data.encoder import Encoder
    from ofmu_ray.tasks.protocol import Evaluation
    from ofmu_ray.training.live import LiveEvaluation


def read_finished(this_run: Run, config: UnlearnConfig) -> Outcome | None:
    """The outcome of a finished run, after sending MLflow what it did not take before; None: not finished."""
    from ofmu_ray import tracking

    outcome = read_unlearned(this_run.home, reused=True)
    if outcome is None:
        return None
    remove_folder(join(this_run.home, "train"))  # left over if killed at the very end
    done = tracking.deliver_late(this_run.home, config.tracking, this_run.storage)
    if done is not None:
        progress.note("mlflow", "has everything now" if done else "does not answer; the rest waits in the run's folder")
    written = recorded_options(this_run.home).get("report")
    if written not in (None, to_dict(config)["report"]):
        options = ", ".join(f"report.{name} {json.dumps(value)}" for name, value in written.items())
        progress.note("report", f"stays as it was written ({options}); --overwrite runs again")
    return replace(outcome, delivered=done is not False)


def unlearn(this_run: Run, config: UnlearnConfig) -> Outcome:
    """Run to the end, or from the newest checkpoint. Raises UserError as `runs.run.run`."""
    from ofmu_ray.cluster.join import join_cluster, run_paths

    task = task_named(config.task)
    check_sources(config.data)
    check_early(task, config)
    check_method(task, config)
    evaluation = evaluation_of(task, config, this_run.storage)
    processor = task.check_model(config.model)
    check_training(task, config)
    for option, path in other_models(config).items():
        task.check_model(ModelConfig(path=path), option)
    encoder = task.encoder(processor, config.data)
    check_evaluation(evaluation, config)
    tags = {"ofmu.kind": "unlearn", "ofmu.method": config.method, "ofmu.config_hash": this_run.digest}
    with this_run.claim.held():
        with tracked(this_run, tags) as handle:
            with this_run.phase("start"):
                progress.note("run", this_run.home)
                if not this_run.here:
                    join_cluster(config.training, this_run.storage, run_paths(config))
                    check_task_on_nodes(config.task)
                check_device_map(config.evaluation)
            with threads(this_run):
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
    from ofmu_ray.metrics.tofu import level_words
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
        summary = fit_rounds(this_run, replace(job, live=live))
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
        metrics = {name: evaluation.metrics(table, retrained) for name, table in tables.items()}
        verdict = evaluation.verdict(tables, metrics)
        options = {"samples": config.evaluation.bootstrap_samples, "seed": config.seed}
        method = job.method.completed(prepared, spec.model, this_run.cache)  # with what the workers have measured
        words = level_words(after, getattr(method, "level", None), **options)
        if words is not None:
            verdict.setdefault("run", {})["level"] = words
    return RunResults(
        training=summary,
        metrics=metrics,
        tables=tables,
        texts=evaluation.texts(),
        verdict=verdict,
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


def _data_line(plan: Any) -> str:
    streams = ", ".join(f"{name} {plan.rows[name]} rows ({plan.epochs[name]:.1f} epochs)" for name in plan.streams)
    return f"{streams}; {plan.rounds} rounds of " + " + ".join(
        f"{count} {name}" for name, count in plan.batches_per_round.items()
    )
