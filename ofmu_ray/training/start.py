"""Entry points of a worker: in Ray Train, or alone in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from ofmu_ray import progress
from ofmu_ray.cluster.watchdog import Watchdog
from ofmu_ray.data.batch_plan import read_plan
from ofmu_ray.data.batches import local_rounds
from ofmu_ray.storage import join, read_text
from ofmu_ray.training.export import export_model
from ofmu_ray.training.session import ListenerReports, LocalSession, RaySession, Reports
from ofmu_ray.training.worker import Worker
from ofmu_ray.training.worker_job import WorkerJob


def worker_loop(config: dict[str, Any]) -> None:
    """The function that Ray Train runs. `config`: the `WorkerJob` and the progress actor."""
    from ofmu_ray.data.stream import rounds, shard_iterator
    from ofmu_ray.training.watch import ActorListener, ActorReports

    job: WorkerJob = config["job"]
    session = RaySession(job.run_dir)
    torch.set_num_threads(max(1, int(job.training.cpus_per_worker)))
    watchdog = Watchdog(session.rank, job.training.round_timeout, config["progress"])
    worker = Worker(job, session, ActorReports(config["progress"]), watchdog)
    plan = read_plan(job.plan_dir)

    def source(start: int, options: dict[str, Any]) -> Iterable[dict[str, list[Any]]]:
        shard = shard_iterator(plan, session.rank, start, readers=session.neighbours, reading=job.reading)
        return rounds(shard, plan, start_round=start, **options)

    worker.run(source)
    watchdog.begin("the export")
    with progress.listening(ActorListener(config["progress"]) if session.rank == 0 else progress.Listener()):
        export_model(job, worker.engine, worker.module, worker.processor, worker.state, session.rank)
        if job.live is not None:
            job.live.end(worker)
    watchdog.close()


def fit_here(job: WorkerJob, title: str) -> dict[str, Any]:
    """`launch.fit` for one worker, in this process without Ray."""
    with progress.bar(title, job.training.rounds, "round") as bar:
        worker = run_local(job, ListenerReports(bar))
    export_model(job, worker.engine, worker.module, worker.processor, worker.state, 0)
    if job.live is not None:
        job.live.end(worker)
    summary: dict[str, Any] = json.loads(read_text(join(job.run_dir, "training.json")))
    return summary


def run_local(job: WorkerJob, reports: Reports | None = None) -> Worker:
    """The same loop for a single worker in this process: for many short runs, each on one core.

    Does not export: the returned worker has the model in memory.
    Raises AssertionError for several workers.
    """
    assert job.training.workers == 1, "run_local is for one worker"
    worker = Worker(job, LocalSession(job.run_dir, job.training.keep_checkpoints, gpu=job.training.gpus > 0), reports)
    plan = read_plan(job.plan_dir)
    worker.run(lambda start, options: local_rounds(plan, 0, start_round=start, reading=job.reading, **options))
    return worker
