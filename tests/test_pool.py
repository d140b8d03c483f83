"""The pool of warm processes: the cost of losing a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ofmu_ray.config import UnlearnConfig, apply_overrides
from ofmu_ray.runs import pool
from ofmu_ray.runs.trial import Trial


def runner(shared: Any) -> Callable[[Trial], dict[str, Any]]:
    """Processes end depending on the trial's number, that of trial 3 once; the remaining ones do the work."""
    done = 0

    def run(trial: Trial) -> dict[str, Any]:
        nonlocal done
        if trial.trial == 1:
            raise ray.exceptions.OutOfMemoryError("the node ran low on memory")
        mark = Path(trial.options["mark"])
        if trial.trial == 2 or (trial.trial == 3 and not mark.exists()):
            mark.touch()
            os._exit(1)
        done += 1
        return {"status": "finished", "done": done}

    return run


def test_a_trial_whose_process_is_killed_too_often_has_failed(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed for its memory (not a RayActorError) or otherwise; a trial killed once and the following ones finish."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    monkeypatch.setattr(pool, "trial_runner", runner)
    config = apply_overrides(UnlearnConfig(), {"training.engine": "torch", "training.max_failures": 1})
    trials = [
        Trial(
            method="ofmu",
            split="a",
            phase="tune",
            trial=number,
            config=config,
            options={"mark": str(tmp_path / str(number))},
            budget_unit="flops",
            budget=1.0,
        )
        for number in range(5)
    ]
    data: Any = {"a": SimpleNamespace(folder=str(tmp_path), fingerprint="0")}
    run = pool.Pool(config, data, 1)
    try:
        results = {trial.trial: result for trial, result in run.run(trials)}
    finally:
        run.close()
    statuses = [results[number]["status"] for number in range(5)]
    assert statuses == ["finished", "failed", "failed", "finished", "finished"], results
    assert "OutOfMemoryError" in results[1]["message"]
    assert "ActorDiedError" in results[2]["message"]
    assert [results[number].get("done") for number in (0, 3, 4)] == [1, 1, 2]
    assert len(list((tmp_path / "trials").glob("*.json"))) == 2  # what the driver records for them
