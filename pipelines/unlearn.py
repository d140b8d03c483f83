"""`ofmu unlearn`: the main job, from configuration to an unlearned model, its metrics, its cost and a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ofmu_ray.cluster.join import join_cluster, run_paths
from ofmu_ray.config import BOUNDED, ModelConfig, OFMUConfig, UnlearnConfig, outcome_hash
from ofmu_ray.errors import UserError
from ofmu_ray.runs import outcome as results
from ofmu_ray.runs.evaluator import Evaluator
from ofmu_ray.runs.preflight import check_machine, check_model, check_sources, claim, placed, prepare_storage, public
from ofmu_ray.storage import drop_copies, explained, join, name_of, remove_file, remove_folder
from pipelines.parse import fail, parse
from pipelines.terminal import say

PROG = "ofmu unlearn"
WATCHED = "watched.parquet"
SIDECARS = "sidecars"
TOKENS = "tokens"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0, 2 for a user's mistake, 1 when the run stopped before its end."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(UnlearnConfig, words, PROG)
        with explained(config.storage):
            return unlearn(config, command=[*PROG.split(), *words])
    except UserError as error:
        return fail(error, PROG)


@dataclass
class Run:
    """One run while it is worked on."""

    config: UnlearnConfig
    storage: str
    home: str
    """<storage>/<name>, a folder or a URI."""
    command: list[str]
    evaluator: Evaluator
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the run."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def unlearn(config: UnlearnConfig, command: list[str]) -> int:
    """Run to the end, or take up what a killed run of the same name left; a finished run is shown, not repeated."""
    storage = prepare_storage(config.storage)
    check_machine(config.training)
    digest = outcome_hash(config)
    home = join(storage, config.name or f"{config.method}-{digest[:8]}")
    claim(home, digest)
    finished = results.read(home)
    if finished is not None:
        remove_folder(join(home, "train"))  # left by a kill at the very end
        say(f"{name_of(home)} is finished already; --name NEW runs it again\n")
        _deliver_late(config, storage, home)
        results.show(finished)
        return 0 if finished["run"]["status"] == "finished" else 1

    tokenizer = check_model(config.model)
    if config.evaluation.enabled and config.evaluation.retrained:
        check_model(ModelConfig(path=config.evaluation.retrained), "evaluation.retrained")
    check_sources(config.data)
    evaluator = Evaluator.of(config, storage)
    claim(home, digest, write=True)
    run = Run(config, storage, home, command, evaluator)
    return _run(run, tokenizer, digest)


def _deliver_late(config: UnlearnConfig, storage: str, home: str) -> None:
    """What MLflow did not take when the run ended."""
    from ofmu_ray import tracking

    done = tracking.deliver_late(home, config.tracking, storage)
    if done is not None:
        say("mlflow  has everything now" if done else "mlflow  does not answer; the rest waits in the run's folder")


def _run(run: Run, tokenizer: Any, digest: str) -> int:
    from ofmu_ray import tracking

    config = run.config
    tags = {"ofmu.kind": "unlearn", "ofmu.method": config.method, "ofmu.config_hash": digest}
    handle = tracking.start(config.tracking, run.storage, name_of(run.home), public(config), tags)
    status: Any = "FAILED"
    outcome: results.Outcome | None = None
    try:
        with tracking.system_metrics(handle, enabled=config.tracking.system_metrics):
            with run.phase("start"):
                say(f"run     {run.home}")
                join_cluster(config.training, run.storage, run_paths(config), say)
            outcome = _work(run, tokenizer, digest, handle)
        status = "FINISHED" if outcome.training["status"] == "finished" else "FAILED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if outcome is None:
            tracking.finish(handle, status=status)
    files = results.write(run.home, outcome, public(config), digest, run.command, tracking.open_command(handle))
    summary = results.read(run.home)
    assert summary is not None
    if not tracking.conclude(run.home, handle, artifacts=files, status=status):
        say(f"mlflow  did not take everything; the same command brings it the rest later, from {run.home}")
    results.show(summary)
    remove_folder(join(run.home, "train"))  # the checkpoints
    drop_copies(join(run.home, "model"))
    return 0 if status == "FINISHED" else 1


def _work(run: Run, tokenizer: Any, digest: str, handle: Any) -> results.Outcome:
    """Data, evaluation before, the two loops, evaluation after."""
    from ofmu_ray.data.batch_plan import write_plan
    from ofmu_ray.data.prepare import prepare_streams, write_sample
    from ofmu_ray.features.level import with_level
    from ofmu_ray.training.job import WorkerJob
    from ofmu_ray.training.launch import fit

    config, training, evaluator = run.config, run.config.training, run.evaluator
    with run.phase("data"):
        prepared = prepare_streams(
            config.sources,
            config.data.root,
            config.data.format,
            tokenizer,
            run.storage,
            private={"forget": join(run.home, TOKENS)},
            overlap=config.data.overlap,
            duplicates=config.data.duplicates,
        )
        watched = None
        if config.stop.utility_floor is not None:
            watched = write_sample(prepared.streams["retain"], config.stop.sample, join(run.home, WATCHED))
        job = WorkerJob(
            run_dir=run.home,
            plan_dir=join(run.home, "plan"),
            config_hash=outcome_hash(config, *(s.fingerprint for s in prepared.streams.values())),
            seed=config.seed,
            model=placed(config.model),
            method=with_level(config.method_options, prepared, placed(config.model), join(run.storage, "cache")),
            training=training,
            stop=config.stop,
            utility_rows=watched,
            tracking=handle,
        )
        plan = write_plan(
            prepared.streams,
            job.plan_dir,
            batches_per_round=job.build_method().batches_per_round(),
            rounds=training.rounds,
            batch_size=training.batch_size,
            workers=training.workers,
            seed=config.seed,
        )
    say(f"data    {_data_line(prepared, plan)}")
    if isinstance(job.method, OFMUConfig) and job.method.forget_loss in BOUNDED:
        say(f"level   forget up to {job.method.forget_level:.3g} nats a token ({job.method.forget_loss})")
    with run.phase("reference"):
        job = replace(job, sidecars=_references(run, job, prepared, plan))
    with run.phase("evaluation"):
        before = evaluator.table(config.model.path, "before")
        retrained = evaluator.table(config.evaluation.retrained, "retrained")
    with run.phase("training"):
        summary = fit(job, "unlearn")
    say(f"train   {summary['round']} rounds, {summary['train_seconds']:.1f} s; {summary['status']}")
    if summary["message"]:
        say(f"stop    {summary['message']}")
    with run.phase("evaluation"):
        after = evaluator.table(join(run.home, "model"), "after")
        metrics = evaluator.metrics(before=before, after=after, retrained=retrained)
    return results.Outcome(
        training=summary,
        metrics=metrics,
        tables={"before": before, "after": after, "retrained": retrained},
        texts=evaluator.texts(),
        data=prepared.report.to_json(),
        seconds=run.seconds,
        plan=plan.fingerprint,
        discard=lambda: _remove_text(run),
    )


def _references(run: Run, job: Any, prepared: Any, plan: Any) -> dict[str, str]:
    """What the method needs to know about rows under the untouched model: sidecars by stream."""
    from ofmu_ray.features.reference import write_references

    return write_references(
        job.build_method().needs,
        prepared,
        plan,
        job.model,
        folder=join(run.home, SIDECARS),
        cache=join(run.storage, "cache"),
        refusals_path=getattr(run.config.method_options, "refusals", None),
        root=run.config.data.root,
        seed=run.config.seed,
        method=run.config.method,
    )


def _data_line(prepared: Any, plan: Any) -> str:
    streams = ", ".join(f"{name} {plan.rows[name]} rows ({plan.epochs[name]:.1f} epochs)" for name in plan.streams)
    return f"{streams}; {plan.rounds} rounds of " + " + ".join(
        f"{count} {name}" for name, count in plan.batches_per_round.items()
    )


def _remove_text(run: Run) -> None:
    """The forget rows' tokens, the batch plan, sidecars and watched rows hold text that must not outlive the run."""
    for name in (TOKENS, "plan", SIDECARS):
        remove_folder(join(run.home, name))
    remove_file(join(run.home, WATCHED))


if __name__ == "__main__":
    sys.exit(main())
