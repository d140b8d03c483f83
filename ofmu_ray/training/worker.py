"""The loop of one Ray Train worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ofmu_ray.cluster.watchdog import Watchdog
from ofmu_ray.data.batch_plan import read_plan
from ofmu_ray.data.batches import local_rounds
from ofmu_ray.data.stream import lane_iterator, rounds
from ofmu_ray.engines.protocol import Engine, Loss
from ofmu_ray.errors import UserError
from ofmu_ray.tasks import task_named
from ofmu_ray.training import checkpoint, integrity
from ofmu_ray.training.checkpoint import LoopState
from ofmu_ray.training.export import export_model
from ofmu_ray.training.job import WorkerJob
from ofmu_ray.training.loop import Loop
from ofmu_ray.training.session import LocalSession, RaySession, Session
from ofmu_ray.training.utility import UtilityProbe


def worker_loop(config: dict[str, Any]) -> None:
    """The function that Ray Train runs. `config` holds the `WorkerJob` and the progress actor."""
    job: WorkerJob = config["job"]
    session = RaySession(job.run_dir)
    torch.set_num_threads(max(1, int(job.training.cpus_per_worker)))
    watchdog = Watchdog(session.rank, job.training.round_timeout, config.get("progress"))
    worker = Worker(job, session, config.get("progress"), watchdog)
    plan = read_plan(job.plan_dir)

    def source(start: int, options: dict[str, Any]) -> Iterable[dict[str, list[Any]]]:
        lane = lane_iterator(plan, session.rank, start, readers=session.neighbours)
        return rounds(lane, plan, start_round=start, **options)

    worker.run(source)
    watchdog.begin("the export")
    export_model(job, worker.engine, worker.module, worker.processor, worker.state, session.rank)
    watchdog.close()


def run_local(job: WorkerJob) -> Worker:
    """The same loop in this process, with the only worker of the run: for many short runs, each on one core.

    Nothing is exported: the returned worker holds the model in memory. Raises AssertionError for more workers.
    """
    assert job.training.workers == 1, "run_local is for one worker"
    worker = Worker(job, LocalSession(job.run_dir, job.training.keep_checkpoints))
    plan = read_plan(job.plan_dir)
    worker.run(lambda start, options: local_rounds(plan, 0, start_round=start, **options))
    return worker


class Worker:
    """A worker with its model: resumes what the session holds, or begins."""

    def __init__(self, job: WorkerJob, session: Session, progress: Any = None, watchdog: Watchdog | None = None):
        torch.manual_seed(job.seed)
        self.job, self.session = job, session
        self.task = task_named(job.task)
        self.module, self.processor = self.task.load(job.model)
        self.collate = self.task.collate(self.processor)
        self.method = job.build_method()
        self.method.freeze(self.module)
        self.engine = build_engine(job, self.module, self.task.loss, session.device)
        self.method.start(self.engine)
        rows, ranks = job.utility_rows, (session.rank, session.world)
        self.probe = UtilityProbe(self.task, self.collate, rows, *ranks) if rows else None
        self.progress = progress
        """Actor that tells the driver how far rank 0 is and what was survived, or None."""
        self.watchdog = watchdog or Watchdog(session.rank, None, None)
        self.resumed = False
        """Whether the state is that of a checkpoint of this run."""
        self.state = self._begin()
        self._exchange_notes()

    def _begin(self) -> LoopState:
        with checkpoint.newest(self.session) as (folder, passed):
            if folder is not None:
                state = checkpoint.restore(folder, self.engine, self.method, self.session, self.job.config_hash)
                self.resumed = True
                state.notes += [f"{text}; went on from round {state.round}" for text in passed]
                return state
        state = LoopState(config_hash=self.job.config_hash)
        state.notes = [f"{text}; began again" for text in passed]
        if self.job.start_from is not None:
            state = self._inherited(Path(self.job.start_from))
        if self.probe is not None and state.utility_start is None:
            state.utility_start = state.utility = self.probe.measure(self.engine)
        checkpoint.save(state, self.engine, self.method, self.session)  # so that there always is a last good model
        return state

    def _exchange_notes(self) -> None:
        """Take up what was noted while no checkpoint could be written, and show what this start has noted."""
        if self.progress is None:
            return
        import ray

        known = ray.get(self.progress.begin.remote())
        self.state.notes = list(dict.fromkeys([*known, *self.state.notes]))
        self.progress.note.remote(*self.state.notes)

    def _inherited(self, folder: Path) -> LoopState:
        """Go on from the end of another run, with this one's options."""
        reason = integrity.damage(folder, self.session.rank, self.session.world)
        if reason is not None:
            raise UserError(f"the checkpoint {folder} to begin with is damaged: {reason}")
        state = checkpoint.restore(folder, self.engine, self.method, self.session, None)
        state.config_hash, state.status, state.message = self.job.config_hash, "running", ""
        state.learning_rate_factor, state.rollbacks, state.notes = 1.0, 0, []
        self.engine.scale_learning_rates(1.0)
        return state

    def run(self, source: Callable[[int, dict[str, Any]], Iterable[dict[str, list[Any]]]]) -> None:
        """Run the rounds that are left. `source(first round, options of collation)` gives their batches."""
        training = self.job.training
        options = {
            "micro_batch_size": training.micro_batch_size or training.batch_size // self.session.world,
            "collate": self.collate,
            "sidecars": self.job.sidecars,
        }
        loop = Loop(self)
        if self.resumed and loop.state.status == "running":
            loop.passed(0.0)
        while loop.state.status == "running" and not _rounds(loop, source(loop.state.round, options)):
            pass  # rolled back: the batches begin again at an earlier round
        self.state = loop.state
        loop.close()


def _rounds(loop: Loop, batches: Iterable[dict[str, list[Any]]]) -> bool:
    """Rounds until the run ends, or (False) until one sends it back to a checkpoint."""
    for of_round in loop.watched(batches):
        if loop.spent() or loop.forgotten():
            break
        before = loop.progress
        if not loop.round(of_round):
            if loop.roll_back():
                return False
            loop.end_at_last_good()
            return True
        if not loop.passed(before):
            return True
    loop.finish()
    return True


def build_engine(job: WorkerJob, module: torch.nn.Module, loss: Loss, device: torch.device) -> Engine:
    """The engine that training.engine names, on a device; `loss` is the task's."""
    training = job.training
    inner, outer = job.method.optimizers
    module = module.to(device)
    precision, offload = job.model.precision, training.offload
    if training.engine == "torch":
        from ofmu_ray.engines import TorchEngine

        return TorchEngine(module, loss_fn=loss, inner=inner, outer=outer, precision=precision, offload=offload)
    from ofmu_ray.engines import DeepSpeedEngine

    return DeepSpeedEngine(
        module,
        loss_fn=loss,
        inner=inner,
        outer=outer,
        zero_stage=training.zero_stage,
        precision=precision,
        offload=offload,
        micro_batch_size=training.micro_batch_size or training.batch_size // training.workers,
    )
