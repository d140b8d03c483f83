"""Stages that rank 0 evaluates alone: the others hear from it now and then."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ofmu_ray.training import stages


class Anything:
    """An engine, a task and an evaluation whose table takes until rank 0 has said twice that it is not there."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.enough = error, threading.Event()
        self.heard: list[bool] = []

    def full_weights(self) -> dict[str, Any]:
        return {}

    def copy(self, module: Any, weights: Any) -> Any:
        return module

    def live_table(self, module: Any, processor: Any, label: str) -> str:
        assert self.enough.wait(60)
        if self.error is not None:
            raise self.error
        return label

    def metrics(self, table: str, retrained: Any) -> dict[str, Any]:
        return {"table": table}

    def agreed(self, value: bool) -> bool:
        self.heard.append(value)
        if len(self.heard) == 2:
            self.enough.set()
        return value


def measured(anything: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(stages, "agreed", anything.agreed)
    monkeypatch.setattr(stages, "ANSWER_SECONDS", 0.01)
    on_the_way = stages.Stages(folder="", count=2, evaluation=anything)
    return on_the_way.measure(anything, anything, None, None, 0, None)  # type: ignore[arg-type]


def test_rank_0_answers_while_it_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    anything = Anything()
    assert measured(anything, monkeypatch) == {"table": "stage"}
    assert anything.heard[:2] == [False, False]
    assert anything.heard[-1]


def test_an_error_of_the_evaluation_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no rows"):
        measured(Anything(ValueError("no rows")), monkeypatch)
