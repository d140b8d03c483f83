"""The loop of a worker, independent of where it runs (ofmu_ray.training.session)."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load

from ofmu_ray.cluster.watchdog import Watchdog
from ofmu_ray.data.sidecar import parameter_files
from ofmu_ray.engines.compiled import compiled_passes
from ofmu_ray.errors import UserError
from ofmu_ray.methods.protocol import run_round
from ofmu_ray.storage import open_mapped
from ofmu_ray.tasks import loaded, task_named
from ofmu_ray.training import checkpoint, integrity
from ofmu_ray.training.checkpoint import LoopState
from ofmu_ray.training.engine_choice import build_engine
from ofmu_ray.training.session import Reports, Session
from ofmu_ray.training.utility import UtilityProbe
from ofmu_ray.training.worker_job import WorkerJob


class Worker:
    """A worker with its model: resumes from the session's checkpoint or starts, then runs the rounds with checks,
    rollbacks, checkpoints, series and progress."""

    def __init__(
        self, job: WorkerJob, session: Session, progress: Reports | None = None, watchdog: Watchdog | None = None
    ):
        torch.manual_seed(job.seed)
        self.job, self.session = job, session
        if session.device.type == "cuda":  # a process may do many runs, and must not report the peak of another
            torch.cuda.init()  # type: ignore[no-untyped-call]  # the reset does not
            torch.cuda.reset_peak_memory_stats(session.device)
        self.task = task_named(job.task)
        self.module, self.processor, unread, notes = loaded(self.task, job.model)
        self.collate = self.task.collate(self.processor)
        self.method = job.build_method()
        if hasattr(self.task, "normalisation"):
            self.task.normalisation(self.module, unlearns=self.method.unlearns, workers=session.world)
        self.method.freeze(self.module)
        self.compiled = compiled_passes(self.module, job.training)
        self.engine = build_engine(job, self.module, self.task.loss, session.device, unread, self.compiled)
        self.watchdog = watchdog or Watchdog(session.rank, None, None)
        if job.references:
            from ofmu_ray.training.live_references import write_references

            write_references(self)
            if hasattr(self.method, "measured"):
                self.method.measured(job.references)
        self.method.start(self.engine)
        for name, path in parameter_files(job.sidecars).items():
            with open_mapped(path) as file:
                self.method.given(name, self.engine, load(file.read()))  # type: ignore[attr-defined]
        rows, ranks = job.utility_rows, (session.rank, session.world)
        self.probe = UtilityProbe(self.task, self.collate, rows, *ranks) if rows else None
        self.progress = progress
        """Receives rank 0's progress and notes."""
        self.logger: Any = None
        self.resumed = False
        """Whether the state comes from a checkpoint of this run."""
        self.state = self._begin()
        self.state.notes += [*notes, *self.method.notes, *self._compiling()]
        self._exchange_notes()

    def _begin(self) -> LoopState:
        with checkpoint.newest(self.session) as (folder, skipped):
            if folder is not None:
                state = checkpoint.restore(folder, self.engine, self.method, self.session, self.job.config_hash)
                self.resumed = True
                state.notes += [f"{text}; resumed from round {state.round}" for text in skipped]
                return state
        state = LoopState(config_hash=self.job.config_hash)
        state.notes = [f"{text}; started over" for text in skipped]
        if self.job.start_from is not None:
            state = self._inherited(Path(self.job.start_from))
        if self.probe is not None and state.utility_start is None:
            state.utility_start = state.utility = self.probe.measure(self.engine)
        checkpoint.save(state, self.engine, self.method, self.session)  # ensures that there is always a last good model
        return state

    def _exchange_notes(self) -> None:
        """Merge notes made while no checkpoint was written, and show this start's notes."""
        if self.progress is None:
            return
        known = self.progress.begin()
        self.state.notes = list(dict.fromkeys([*known, *self.state.notes]))
        self.progress.note(*self.state.notes)
        if self.resumed and self.session.rank == 0:
            self.progress.resumed(self.state.round)

    def _inherited(self, folder: Path) -> LoopState:
        """Continue from the end of another run, with this run's options."""
        reason = integrity.damage(folder, self.session.rank, self.session.world)
        if reason is not None:
            raise UserError(f"the checkpoint {folder} to start from is damaged: {reason}")
        state = checkpoint.restore(folder, self.engine, self.method, self.session, None)
        state.config_hash, state.status, state.message = self.job.config_hash, "running", ""
        state.learning_rate_factor, state.rollbacks, state.notes = 1.0, 0, []
        self.engine.scale_learning_rates(1.0)
        return state

    def run(self, source: Callable[[int, dict[str, Any]], Iterable[dict[str, list[Any]]]]) -> None:
        """Run the remaining rounds. `source(first round, collation options)` yields their batches."""
        training = self.job.training
        options = {
            "micro_batch_size": training.micro_batch_size or training.batch_size // self.session.world,
            "collate": self.collate,
            "sidecars": self.job.sidecars,
        }
        self._open_logger()
        if self.job.live is not None:
            self.job.live.begin(self)
        if self.resumed and self.state.status == "running":
            self.passed(0.0)
        while self.state.status == "running" and not self._rounds(source(self.state.round, options)):
            pass  # rolled back: batches restart at an earlier round
        self.close()

    def _rounds(self, batches: Iterable[dict[str, list[Any]]]) -> bool:
        """Run rounds until the run ends; False: a round reset it to a checkpoint."""
        for of_round in self.watched(batches):
            if self.spent() or self.forgotten():
                break
            before = self.done
            if not self.round(of_round):
                if self.roll_back():
                    return False
                self.end_at_last_good()
                return True
            if not self.passed(before):
                return True
        self.finish()
        return True

    def _open_logger(self) -> None:
        if self.session.rank == 0 and self.job.tracking is not None:
            from ofmu_ray.tracking import RoundLogger

            self.logger = RoundLogger(self.job.tracking)
            for row in self.state.series:  # undelivered values of a killed worker; those that MLflow has are skipped
                self.logger.log(int(row["round"]), {name: value for name, value in row.items() if name != "round"})

    def watched(self, batches: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, list[Any]]]:
        """The batches of each round; the watchdog covers reading them, the round and its checkpoint."""
        source = iter(batches)
        while True:
            self.watchdog.begin(f"round {self.state.round + 1}")
            try:
                of_round = next(source)
            except StopIteration:
                return
            yield of_round

    def round(self, batches: dict[str, list[Any]]) -> bool:
        """Run one round; False: stop and discard the weights."""
        state, training = self.state, self.job.training
        started, tokens = time.perf_counter(), self.engine.account.tokens
        values = run_round(self.method, self.engine, batches)
        seconds = time.perf_counter() - started
        state.round += 1
        state.train_seconds += seconds
        state.peak_memory_bytes = max(state.peak_memory_bytes, peak_memory_bytes(self.session.device))

        passes = self.engine.account.gradient_passes
        for name in values:
            if name == "lr" or name.endswith("_lr"):  # from the method's schedule to the actual rate
                values[name] *= state.learning_rate_factor
        values |= {"forget_passes": passes["forget"], "retain_passes": passes["retain"]}
        values["tokens_per_second"] = (self.engine.account.tokens - tokens) / seconds
        good = self._finite(values) and self._useful(values)
        self._log(values)
        self._note(*(self.method.notes if good else ()), *self._compiling())
        last = state.round == training.rounds
        due = state.round % training.checkpoint_every == 0 or self._check_due()
        if good and due and not last:
            checkpoint.save(state, self.engine, self.method, self.session)
        return good

    @property
    def done(self) -> float:
        """Progress of the run (0 to 1), by the closest of its limits."""
        stop, account = self.job.stop, self.engine.account
        shares = [self.state.round / self.job.training.rounds]
        for spent, limit in ((sum(account.gradient_passes.values()), stop.max_passes), (account.flops, stop.max_flops)):
            shares += [] if limit is None else [spent / limit]
        return max(shares)

    def passed(self, before: float) -> bool:
        """If a stage was passed since progress `before`: evaluate and wait for the decision; False: end the run.

        From 0: the last stage before a resumed run's checkpoint, whose decision a kill may have left open. Collective.
        """
        stages = self.job.stages
        stage = None if stages is None else stages.reached(before, self.done)
        if stages is None or stage is None:
            return True
        result = stages.known(stage)
        if result is None:
            checkpoint.save(self.state, self.engine, self.method, self.session)  # the decision may take a while
        self.watchdog.end()
        metrics = None
        if result is None:
            metrics = stages.measure(
                self.task, self.engine, self.module, self.processor, self.session.rank, self.watchdog
            )
        if metrics is not None:
            state, account = self.state, self.engine.account.state()
            spent = {"round": state.round, "train_seconds": state.train_seconds, "account": account}
            spent["peak_memory_bytes"] = state.peak_memory_bytes
            result = {"stage": stage, "figures": metrics, **spent}
            stages.publish(stage, result)
        if result is not None:
            self._log_stage(result)
        if stages.wait(stage, self.session.rank):
            return True
        self.state.status = "stopped"
        self.state.message = f"stopped after evaluation {stage} of {stages.count}"
        self._save_end()
        return False

    def _log_stage(self, result: Mapping[str, Any]) -> None:
        if self.logger is not None:
            values = {f"stage/{name}": metric["value"] for name, metric in result["figures"].items()}
            self.logger.log(result["round"], {name: value for name, value in values.items() if value is not None})

    def spent(self) -> bool:
        """Whether another round of mean cost would exceed stop.max_passes or stop.max_flops."""
        stop, account, rounds = self.job.stop, self.engine.account, self.state.round + self.state.thrown_away
        if rounds == 0:
            return False
        passes = sum(account.gradient_passes.values())
        pairs = ((passes, stop.max_passes), (account.flops, stop.max_flops))
        return any(limit is not None and spent * (rounds + 1) / rounds > limit for spent, limit in pairs)

    def forgotten(self) -> bool:
        """Whether the last stop.forgotten rounds took no ascent step: every forget row is at its level."""
        patience, steps = self.job.stop.forgotten, getattr(self.job.method, "inner_steps", None)
        if patience is None or steps is None or len(self.state.series) < patience:
            return False
        if any(entry.get("skipped_ascents") != steps for entry in self.state.series[-patience:]):
            return False
        self.state.message = f"forgotten: {patience} rounds in a row had nothing left to forget (stop.forgotten)"
        return True

    def _check_due(self) -> bool:
        stop, at = self.job.stop, self.state.round
        return self.probe is not None and (at % stop.check_every == 0 or at == self.job.training.rounds)

    def _finite(self, values: dict[str, float]) -> bool:
        # losses are measured before the last step; the weights' norm covers it
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad and math.isfinite(self.engine.parameters_norm()):
            return True
        what = ", ".join(bad) if bad else "the weights' norm"
        self.state.status = "non_finite"
        self.state.message = f"not finite in round {self.state.round}: {what}; lower the learning rates"
        return False

    def _useful(self, values: dict[str, float]) -> bool:
        if not self._check_due() or self.probe is None:
            return True
        state, floor = self.state, self.job.stop.utility_floor
        state.utility = values["utility"] = self.probe.measure(self.engine)
        assert state.utility_start is not None
        assert floor is not None
        if state.utility >= floor * state.utility_start:
            return True
        state.status = "utility_floor"
        state.message = (
            f"utility floor reached in round {state.round}: mean answer probability on the monitored retain rows is "
            f"{state.utility:.4f}, below {floor:g} x {state.utility_start:.4f}"
        )
        return False

    def _log(self, values: dict[str, float]) -> None:
        self.state.series.append({"round": self.state.round, **values})
        if self.session.rank != 0:
            return
        if self.logger is not None:
            self.logger.log(self.state.round, values)
        if self.progress is not None:
            self.progress.update(self.state.round, values)

    def _note(self, *sentences: str) -> None:
        self.state.notes.extend(sentences)
        if self.progress is not None and self.session.rank == 0:
            for sentence in sentences:
                self.progress.note(sentence)

    def _compiling(self) -> list[str]:
        return [] if self.compiled is None else self.compiled.new_notes()

    def roll_back(self) -> bool:
        """After a non-finite round, return to the last good checkpoint, with smaller steps. False: not (or no longer).

        Pass counts and seconds keep the cost of the discarded rounds; the series drops them.
        """
        bad, stop = self.state, self.job.stop
        if bad.status != "non_finite" or bad.rollbacks >= stop.max_rollbacks:
            return False
        self._return_to_last_good()
        state = self.state
        state.rollbacks += 1
        state.learning_rate_factor *= stop.shrink
        self._note(
            f"{bad.message.partition(';')[0]}: back to round {state.round}, learning rates x "
            f"{state.learning_rate_factor:g} from there (rollback {state.rollbacks} of at most {stop.max_rollbacks})"
        )
        self.engine.scale_learning_rates(state.learning_rate_factor)
        if self.logger is not None:
            self.logger.rewind(state.round)
        checkpoint.save(state, self.engine, self.method, self.session)  # keeps the cost after a kill
        return True

    def end_at_last_good(self) -> None:
        """End with weights and cursor of the last checkpoint; keep the reason, the series and the cost."""
        stopped = self.state
        self._return_to_last_good()
        self.state.status = stopped.status
        self.state.message = f"{stopped.message}; the model is from round {self.state.round}"
        self.state.series = stopped.series
        self._save_end()

    def _return_to_last_good(self) -> None:
        """Restore everything but the cost from the newest intact checkpoint."""
        bad, account = self.state, self.engine.account.state()
        with checkpoint.newest(self.session) as (folder, skipped):
            if folder is None:
                raise UserError(f"{bad.message}, and no checkpoint is intact ({'; '.join(skipped)}): start over")
            self.state = checkpoint.restore(folder, self.engine, self.method, self.session, self.job.config_hash)
        self.engine.account.load(account)
        state = self.state
        state.notes = [*bad.notes, *skipped]
        state.train_seconds, state.peak_memory_bytes = bad.train_seconds, bad.peak_memory_bytes
        state.thrown_away = bad.thrown_away + bad.round - state.round
        state.rollbacks, state.learning_rate_factor = bad.rollbacks, bad.learning_rate_factor

    def finish(self) -> None:
        self.state.status = "finished"
        self._save_end()

    def _save_end(self) -> None:
        state = self.state
        self.watchdog.begin("the last checkpoint")
        if dist.is_initialized():
            peak = torch.tensor(float(state.peak_memory_bytes), dtype=torch.float64)
            peak = peak.to(self.engine.device)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            state.peak_memory_bytes = int(peak)
        checkpoint.save(state, self.engine, self.method, self.session)

    def close(self) -> None:
        """Deliver the series, and record whether MLflow has all of it."""
        if self.logger is not None:
            self.state.undelivered = not self.logger.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on its CUDA device, else the resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
