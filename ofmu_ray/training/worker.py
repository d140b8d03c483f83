"""The loop of one Ray Train worker."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ofmu_ray.data.batches import local_rounds
from ofmu_ray.data.plan import read_plan
from ofmu_ray.data.stream import lane_iterator, rounds
from ofmu_ray.engines.models import load_causal_lm
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.training import checkpoint
from ofmu_ray.training.checkpoint import LoopState
from ofmu_ray.training.export import export_model
from ofmu_ray.training.job import WorkerJob
from ofmu_ray.training.session import LocalSession, RaySession, Session
from ofmu_ray.training.utility import UtilityProbe


def worker_loop(config: dict[str, Any]) -> None:
    """The function that Ray Train runs. `config` holds the `WorkerJob` and the progress actor."""
    job: WorkerJob = config["job"]
    session = RaySession()
    torch.set_num_threads(max(1, int(job.training.cpus_per_worker)))
    worker = Worker(job, session, config.get("progress"))
    plan = read_plan(job.plan_dir)
    worker.run(
        lambda start, options: rounds(lane_iterator(plan, session.rank, start), plan, start_round=start, **options)
    )
    export_model(job, worker.engine, worker.module, worker.tokenizer, worker.state, session.rank)


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

    def __init__(self, job: WorkerJob, session: Session, progress: Any = None):
        torch.manual_seed(job.seed)
        self.job, self.session = job, session
        self.module, self.tokenizer = load_causal_lm(job.model)
        self.method = job.build_method()
        self.method.freeze(self.module)
        self.engine = build_engine(job, self.module, session.device)
        self.method.start(self.engine)
        rank, world = session.rank, session.world
        rows, pad_id = job.utility_rows, self.tokenizer.pad_token_id
        self.probe = UtilityProbe(rows, rank, world, pad_id) if rows else None
        self.progress = progress
        """Actor that tells the driver how far rank 0 is, or None."""
        self.state = self._begin()

    def _begin(self) -> LoopState:
        resumed = self.session.resumed()
        if resumed is not None:
            with resumed as folder:
                return checkpoint.restore(folder, self.engine, self.method, self.session.rank, self.job.config_hash)
        state = LoopState(config_hash=self.job.config_hash)
        if self.job.start_from is not None:
            state = self._inherited(Path(self.job.start_from))
        if self.probe is not None and state.utility_start is None:
            state.utility_start = state.utility = self.probe.measure(self.engine)
        checkpoint.save(state, self.engine, self.method, self.session)  # so that there always is a last good model
        return state

    def _inherited(self, folder: Path) -> LoopState:
        """Go on from the end of another run, with this one's options."""
        state = checkpoint.restore(folder, self.engine, self.method, self.session.rank, None)
        state.config_hash, state.status, state.message = self.job.config_hash, "running", ""
        return state

    def run(self, source: Callable[[int, dict[str, Any]], Iterable[dict[str, list[Any]]]]) -> None:
        """Run the rounds that are left. `source(first round, options of collation)` gives their batches."""
        training = self.job.training
        loop = _Loop(self)
        if self.state.status == "running":
            options = {
                "micro_batch_size": training.micro_batch_size or training.batch_size // self.session.world,
                "pad_id": self.tokenizer.pad_token_id,
                "sidecars": self.job.sidecars,
            }
            for batches in source(self.state.round, options):
                if loop.spent():
                    loop.finish()
                    break
                before = loop.progress
                if not loop.round(batches):
                    loop.back_to_last_good()
                    break
                if not loop.passed(before):
                    break
            else:
                loop.finish()
        self.state = loop.state
        loop.close()


def build_engine(job: WorkerJob, module: torch.nn.Module, device: torch.device) -> Engine:
    """The engine that training.engine names, on a device."""
    training = job.training
    inner, outer = job.method.optimizers
    module = module.to(device)
    precision, offload = job.model.precision, training.offload
    if training.engine == "torch":
        from ofmu_ray.engines import TorchEngine

        return TorchEngine(module, inner=inner, outer=outer, precision=precision, offload=offload)
    from ofmu_ray.engines import DeepSpeedEngine

    return DeepSpeedEngine(
        module,
        inner=inner,
        outer=outer,
        zero_stage=training.zero_stage,
        precision=precision,
        offload=offload,
        micro_batch_size=training.micro_batch_size or training.batch_size // training.workers,
    )


class _Loop:
    """One round after the other, with what surrounds it: checks, checkpoints, series, progress."""

    def __init__(self, worker: Worker):
        job, session = worker.job, worker.session
        self.job, self.engine, self.method, self.probe = job, worker.engine, worker.method, worker.probe
        self.module, self.tokenizer = worker.module, worker.tokenizer
        self.state, self.session, self.display = worker.state, session, worker.progress
        self.logger = None
        if session.rank == 0 and job.tracking is not None:
            from ofmu_ray.tracking import RoundLogger

            self.logger = RoundLogger(job.tracking)
            for row in self.state.series:  # a kill may have lost what was not delivered; what was is left out
                self.logger.log(int(row["round"]), {name: value for name, value in row.items() if name != "round"})

    def round(self, batches: dict[str, list[Any]]) -> bool:
        """Run one round; False: stop, the weights are not to be kept."""
        state, training = self.state, self.job.training
        started, tokens = time.perf_counter(), self.engine.account.tokens
        retain = batches["retain"] if "retain" in batches else batches["train"]
        figures = self.method.round(self.engine, iter(batches.get("forget", [])), iter(retain))
        seconds = time.perf_counter() - started
        state.round += 1
        state.train_seconds += seconds
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory_bytes())

        passes = self.engine.account.gradient_passes
        figures |= {"forget_passes": passes["forget"], "retain_passes": passes["retain"]}
        figures["tokens_per_second"] = (self.engine.account.tokens - tokens) / seconds
        good = self._finite(figures) and self._useful(figures)
        self._log(figures)
        last = state.round == training.rounds
        due = state.round % training.checkpoint_every == 0 or self._check_due()
        if good and due and not last:
            checkpoint.save(state, self.engine, self.method, self.session)
        return good

    @property
    def progress(self) -> float:
        """How much of the run is done (0 to 1), by whichever of its limits is nearest."""
        stop, account = self.job.stop, self.engine.account
        done = [self.state.round / self.job.training.rounds]
        for spent, limit in ((sum(account.gradient_passes.values()), stop.max_passes), (account.flops, stop.max_flops)):
            done += [] if limit is None else [spent / limit]
        return max(done)

    def passed(self, before: float) -> bool:
        """Evaluate and ask, where the last round passed a stage; False: the run is to end here. Collective."""
        stages = self.job.stages
        stage = None if stages is None else stages.reached(before, self.progress)
        if stages is None or stage is None:
            return True
        checkpoint.save(self.state, self.engine, self.method, self.session)  # the decision may take its time
        found = stages.known(stage)
        figures = stages.measure(self.engine, self.module, self.tokenizer, self.session.rank) if found is None else None
        if figures is not None:
            state, account = self.state, self.engine.account.state()
            spent = {"round": state.round, "train_seconds": state.train_seconds, "account": account}
            spent["peak_memory_bytes"] = state.peak_memory_bytes
            found = {"stage": stage, "figures": figures, **spent}
            stages.publish(stage, found)
        if found is not None:
            self._log_stage(found["figures"])
        if stages.wait(stage, self.session.rank):
            return True
        self.state.status = "stopped"
        self.state.message = f"ended after evaluation {stage} of {stages.count}"
        self._save_end()
        return False

    def _log_stage(self, figures: Mapping[str, Any]) -> None:
        if self.logger is not None:
            values = {f"stage/{name}": found["value"] for name, found in figures.items()}
            self.logger.log(self.state.round, {name: value for name, value in values.items() if value is not None})

    def spent(self) -> bool:
        """Whether another round, at the mean cost of those so far, would exceed stop.max_passes or stop.max_flops."""
        stop, account, rounds = self.job.stop, self.engine.account, self.state.round
        if rounds == 0:
            return False
        passes = sum(account.gradient_passes.values())
        pairs = ((passes, stop.max_passes), (account.flops, stop.max_flops))
        return any(limit is not None and spent * (rounds + 1) / rounds > limit for spent, limit in pairs)

    def _check_due(self) -> bool:
        stop, at = self.job.stop, self.state.round
        return self.probe is not None and (at % stop.check_every == 0 or at == self.job.training.rounds)

    def _finite(self, figures: dict[str, float]) -> bool:
        # the weights' norm shows what the losses, which were measured before the last step, cannot
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if not bad and math.isfinite(self.engine.parameters_norm()):
            return True
        what = ", ".join(bad) if bad else "the weights' norm"
        self.state.status = "non_finite"
        self.state.message = f"not finite in round {self.state.round}: {what}; lower the learning rates"
        return False

    def _useful(self, figures: dict[str, float]) -> bool:
        if not self._check_due() or self.probe is None:
            return True
        state, floor = self.state, self.job.stop.utility_floor
        state.utility = figures["utility"] = self.probe.measure(self.engine)
        assert state.utility_start is not None
        assert floor is not None
        if state.utility >= floor * state.utility_start:
            return True
        state.status = "utility_floor"
        state.message = (
            f"utility floor reached in round {state.round}: mean answer probability on the watched retain rows is "
            f"{state.utility:.4f}, below {floor:g} x {state.utility_start:.4f}"
        )
        return False

    def _log(self, figures: dict[str, float]) -> None:
        self.state.series.append({"round": self.state.round, **figures})
        if self.session.rank != 0:
            return
        if self.logger is not None:
            self.logger.log(self.state.round, figures)
        if self.display is not None:
            self.display.update.remote(self.state.round, figures)

    def back_to_last_good(self) -> None:
        """Weights and cursor of the last checkpoint; the stop's reason, the series and the cost stay."""
        stopped, account = self.state, self.engine.account.state()
        with self.session.last_good() as folder:
            self.state = checkpoint.restore(folder, self.engine, self.method, self.session.rank, self.job.config_hash)
        self.engine.account.load(account)
        self.state.status = stopped.status
        self.state.message = f"{stopped.message}; the model is that of round {self.state.round}"
        self.state.series, self.state.train_seconds = stopped.series, stopped.train_seconds
        self._save_end()

    def finish(self) -> None:
        self.state.status = "finished"
        self._save_end()

    def _save_end(self) -> None:
        state = self.state
        if dist.is_initialized():
            peak = torch.tensor(float(state.peak_memory_bytes), dtype=torch.float64)
            peak = peak.to(self.engine.device)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            state.peak_memory_bytes = int(peak)
        checkpoint.save(state, self.engine, self.method, self.session)

    def close(self) -> None:
        if self.logger is not None:
            self.logger.close()


def peak_memory_bytes() -> int:
    """Highest memory of this process: allocated on the CUDA device, else the resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
