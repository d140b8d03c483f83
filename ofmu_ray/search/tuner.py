"""A sweep on Ray Tune: the ledger's trials as a search algorithm, schedulers that record their decisions, and the
trainable that runs a trial."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# read when Tune is imported: no boxes on the terminal (the sweep prints its own lines), no log files, and trials in the
# driver's working directory, which relative paths start from
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from ofmu_ray.config import EarlyConfig, TrackingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.fronts import plain
from ofmu_ray.runs.trial import TrialHooks, run_trial, write_failure
from ofmu_ray.search.trial_ledger import TrialLedger

POLL_SECONDS = 0.1


_LEDGERS: dict[str, TrialLedger] = {}
"""By folder. Tune writes its arguments into the sweep's folder, and a ledger's data contain the forget rows' text."""


class _OfLedger:
    """An object that Tune copies and stores; it therefore holds only its ledger's folder."""

    folder: str

    @property
    def ledger(self) -> TrialLedger:
        return _LEDGERS[self.folder]

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class LedgerSearch(_OfLedger, Searcher):  # type: ignore[misc]
    """The ledger's trials in order; finished trials are reported again, for the scheduler."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.next = folder, 0
        self.exhausted = False
        """The space was exhausted before all trials were suggested."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.next >= self.ledger.config.search.trials:
            return str(Searcher.FINISHED)
        new = self.next >= len(self.ledger.suggestions)
        if new and self.ledger.search.waits(self.next, self.ledger.earlier()):  # asked first: a trial may end meanwhile
            return None
        suggestion = self.ledger.suggestion(self.next)
        if suggestion is None:
            self.exhausted = True
            return str(Searcher.FINISHED)
        self.next += 1
        return {"number": suggestion.number, "key": self.ledger.key(suggestion.number)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: results are read from the ledger."""

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Tune's snapshots are not used: a sweep resumes from its ledger

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep resumes from its ledger")


class _DecisionWriter(_OfLedger):
    """Writes a scheduler's decisions to the ledger, where the trial's workers wait for them."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(controller, trial, result)  # type: ignore[misc]
        go = self.ledger.decide(result["number"], result["stage"], go=action != TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE if go else TrialScheduler.STOP)


class _All(_DecisionWriter, FIFOScheduler):  # type: ignore[misc]
    """Runs every trial to its end."""


class _Halving(_DecisionWriter, AsyncHyperBandScheduler):  # type: ignore[misc]
    """Asynchronous successive halving."""


class _Median(_DecisionWriter, MedianStoppingRule):  # type: ignore[misc]
    """Stops trials below the median of the others."""


class _Generations(_DecisionWriter, FIFOScheduler):  # type: ignore[misc]
    """Stops every trial of a population after its generation; the last generation runs to its end."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        generation = result["number"] // self.ledger.config.search.population
        go = self.ledger.decide(result["number"], result["stage"], go=result["stage"] <= generation)
        return str(TrialScheduler.CONTINUE if go else TrialScheduler.STOP)


def scheduler(early: EarlyConfig, ledger: TrialLedger) -> TrialScheduler:
    """The scheduler of a sweep."""
    chosen: Any
    if ledger.config.search.kind == "population":
        chosen = _Generations()
    elif early.kind == "asha":
        chosen = _Halving(
            time_attr="stage", metric="score", mode="max", max_t=early.stages, grace_period=early.grace,
            reduction_factor=early.reduction_factor,
        )  # fmt: skip
    elif early.kind == "median":
        chosen = _Median(time_attr="stage", metric="score", mode="max", grace_period=early.grace)
    else:
        chosen = _All()
    chosen.folder = str(ledger.folder)
    return chosen


class TrialRun(tune.Trainable):  # type: ignore[misc]
    """One trial, in a thread of an actor that is reused for the next; a step lasts until the next evaluation."""

    def setup(
        self, config: dict[str, Any], ledger: Any = None, parent: Any = None, tracking: Any = None, local: bool = True
    ) -> None:
        import torch

        torch.set_num_threads(max(1, int(ledger.config.base.training.cpus_per_worker)))
        self.ledger: TrialLedger = ledger
        self.parent, self.tracking, self.local = parent, tracking, local
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._join()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.number, self.stage = int(config["number"]), 0
        self.thread: threading.Thread | None = None
        key = self.ledger.key(self.number)
        assert key == config["key"], "this node has another version of the code than the driver"
        if self.ledger.result(self.number) is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def _run(self) -> None:
        trial = self.ledger.trial(self.number)
        handle = child_run(self.tracking, self.ledger, self.number, self.parent)
        watch = TrialHooks(stages=trial.stages, tracking=handle, parent=trial.parent)
        run_trial(trial, self.ledger.data, local=self.local, watch=watch)

    def step(self) -> dict[str, Any]:
        while True:
            ended = self.thread is None or not self.thread.is_alive()
            for evaluation in self.ledger.evaluations(self.number):
                if evaluation["stage"] > self.stage:
                    self.stage = evaluation["stage"]
                    return self._report(evaluation["figures"], done=False, share=self.ledger.search.share)
            if ended:
                result = self.ledger.result(self.number)
                assert result is not None, f"trial {self.number} ended without a result"
                if result["status"] == "stopped":  # as it was reported when it was stopped
                    last = result["evaluations"][-1]["figures"]
                    return self._report(last, done=True, share=self.ledger.search.share)
                self.stage = self.stage if result["status"] == "failed" else self.ledger.stage_count
                return self._report(result.get("figures") or {}, done=True)
            time.sleep(POLL_SECONDS)

    def _report(self, metrics: dict[str, Any], *, done: bool, share: float = 1.0) -> dict[str, Any]:
        score = self.ledger.search.goal.score(plain(metrics), share)
        return {"number": self.number, "stage": self.stage, "score": score, "done": done}

    def cleanup(self) -> None:
        self._join()

    def _join(self) -> None:
        """Wait for a trial that was stopped early to write its result; leave a trial whose driver is going away."""
        if self.thread is None or not self.thread.is_alive():
            return
        from ofmu_ray.runs.trial import work_path
        from ofmu_ray.training.stage_files import decision

        folder = work_path(self.ledger.folder, self.ledger.key(self.number)) / "stages"
        if decision(folder, self.stage) is False:
            self.thread.join()


def child_run(
    tracking: TrackingConfig, ledger: TrialLedger, number: int, parent: Any, result: Mapping[str, Any] | None = None
) -> Any:
    """Start or reopen a trial's MLflow run; None if MLflow does not answer: a trial runs without it."""
    from ofmu_ray import tracking as mlflow

    suggestion, ended = ledger.suggestions[number], result or {"status": "running"}
    options = {"method": ledger.config.label, "trial": number, "parent": suggestion.parent, **suggestion.options}
    tags = {
        "mlflow.parentRunId": parent.run_id,
        "ofmu.kind": "trial",
        "ofmu.status": ended["status"],
        "ofmu.message": ended.get("message", ""),
    }
    name = f"{ledger.config.name}/{number:04d}"
    try:
        record = ledger.folder / "mlflow" / f"{number:04d}.json"
        return mlflow.start(tracking, str(ledger.folder.parent), name, options, tags, record=record)
    except UserError:
        return None


_ENDED: dict[str, Callable[[int], None]] = {}
"""By folder: the callback for finished trials."""


class _ReportsEnds(_OfLedger, tune.Callback):  # type: ignore[misc]
    """Reports finished trials, and records the failure of those that could not record it themselves."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        _ENDED[self.folder](trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        if self.ledger.result(number) is None:  # killed more often than training.max_failures, perhaps for its memory
            write_failure(self.ledger.trial(number), self.ledger.data, "its process ended")
        _ENDED[self.folder](number)


def run(
    ledger: TrialLedger, parent: Any, concurrency: int, on_end: Callable[[int], None], *, local: bool
) -> tuple[bool, bool]:
    """Run all unfinished trials. Returns (all trials have finished, the space was exhausted).

    `on_end` is called in this process with the number of each trial that finishes.
    """
    import shutil

    training, folder = ledger.config.base.training, ledger.folder / "tune"
    shutil.rmtree(folder, ignore_errors=True)
    share = {"CPU": training.cpus_per_worker} | ({"GPU": training.gpus} if training.gpus else {})
    # a trial with several workers only drives its Ray Train job, which has its own resources: it needs none itself
    bundle = share if local else {"node:__internal_head__": 0.001}
    _LEDGERS[str(ledger.folder)] = ledger
    search = LedgerSearch(str(ledger.folder))
    _ENDED[str(ledger.folder)] = on_end
    trainable = tune.with_parameters(
        TrialRun, ledger=ledger, parent=parent, tracking=ledger.config.base.tracking, local=local
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([bundle])),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler(ledger.config.early, ledger),
            num_samples=ledger.config.search.trials,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(ledger.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=training.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a run writes its own
            callbacks=[_ReportsEnds(str(ledger.folder))],
        ),
    )
    with _same_signals():
        tuner.fit()
    shutil.rmtree(folder, ignore_errors=True)
    return finished(ledger, search.exhausted), search.exhausted


@contextmanager
def _same_signals() -> Iterator[None]:
    """Have Ctrl-C mean afterwards what it meant before: Tune's handler stays, and swallows the next one."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # Tune sets handlers there only
            for one, handler in before.items():
                signal.signal(one, handler)


def finished(ledger: TrialLedger, exhausted: bool) -> bool:
    """Whether all trials have finished; an earlier start may have begun more than are asked for now."""
    wanted = ledger.config.search.trials
    ended = [ledger.result(number) is not None for number in range(min(len(ledger.suggestions), wanted))]
    return all(ended) and (len(ended) == wanted or exhausted)
