"""Reports from the workers to the driver while `fit` blocks: progress, and problems survived."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import ray

from ofmu_ray import progress
from ofmu_ray.cluster.watchdog import Heartbeat
from ofmu_ray.training.session import losses_of, resumption

POLL_SECONDS = 0.5
Phase: TypeAlias = tuple[str, int, str, int]
"""Title, total and unit of some work, and how much is done."""


@ray.remote(num_cpus=0)
class Progress:
    """The actor between both sides; it lives as long as the driver, so notes outlive the workers."""

    def __init__(self) -> None:
        self.now: tuple[int, dict[str, float]] = (0, {})
        self.notes: list[str] = []
        self.resumptions: list[int] = []
        self.last: dict[int, Heartbeat] = {}
        self.within: Phase | None = None

    def phase(self, phase: Phase | None) -> None:
        """Rank 0: the work under way besides rounds, such as the export; None: it is done."""
        self.within = phase

    def update(self, done: int, values: dict[str, float]) -> None:
        """Rank 0: rounds done and the metrics of the last one."""
        self.now = (done, values)

    def note(self, *texts: str) -> None:
        """Messages for the user, each shown once."""
        self.notes += [text for text in dict.fromkeys(texts) if text not in self.notes]

    def resumed(self, done: int) -> None:
        """Rank 0: the run resumes after `done` rounds."""
        self.now = (done, {})
        self.resumptions.append(done)

    def sign(self, rank: int, where: str) -> None:
        """A rank is alive."""
        self.last[rank] = Heartbeat(time.monotonic(), where)

    def signs(self) -> tuple[float, dict[int, Heartbeat]]:
        """This actor's clock, and the last heartbeat of each rank."""
        return time.monotonic(), self.last

    def begin(self) -> list[str]:
        """The workers start (again); returns the notes so far."""
        self.last, self.within = {}, None
        return self.notes

    def read(self) -> tuple[int, dict[str, float], list[str], list[int], Phase | None]:
        """Rounds done, metrics of the last one, notes, rounds after which the run resumed, other work under way."""
        return (*self.now, self.notes, self.resumptions, self.within)


class ActorReports:
    """A worker's side of the actor (training.session.Reports)."""

    def __init__(self, actor: Any):
        self.actor = actor

    def begin(self) -> list[str]:
        """The workers start (again); returns the notes so far."""
        notes: list[str] = ray.get(self.actor.begin.remote())
        return notes

    def resumed(self, done: int) -> None:
        """The run resumes after `done` rounds."""
        self.actor.resumed.remote(done)

    def note(self, *texts: str) -> None:
        """Messages for the user, each shown once."""
        self.actor.note.remote(*texts)

    def update(self, done: int, values: dict[str, float]) -> None:
        """Rounds done and the metrics of the last one."""
        self.actor.update.remote(done, values)


class ActorListener(progress.Listener):
    """A worker's listener: of nested bars, the driver sees the inner one."""

    def __init__(self, actor: Any):
        self.actor = actor

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[progress.Bar]:
        """Work of `total` units that runs in the block."""
        yield _ActorBar(self.actor, title, total, unit)
        self.actor.phase.remote(None)


class _ActorBar(progress.Bar):
    def __init__(self, actor: Any, title: str, total: int, unit: str):
        self.actor, self.title, self.total, self.unit, self.done = actor, title, total, unit, 0

    def update(self, count: int = 1) -> None:
        self.at(self.done + count)

    def at(self, done: int, **shown: str) -> None:
        self.done = done
        self.actor.phase.remote((self.title, self.total, self.unit, done))


class ProgressForwarder:
    """Forwards the actor's reports to the listener while the driver waits for the workers."""

    def __init__(self, actor: Any, rounds: int, title: str):
        self.actor, self.rounds, self.title = actor, rounds, title
        self.listener = progress.current()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._pass_on, daemon=True)
        self._noted = self._resumed = 0
        self._within: tuple[tuple[str, int, str], progress.Bar] | None = None
        self._block = ExitStack()

    def __enter__(self) -> ProgressForwarder:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(timeout=10)

    def _pass_on(self) -> None:
        with self.listener.bar(self.title, self.rounds, "round") as bar, self._block:
            while not self.stop.wait(POLL_SECONDS):
                self._refresh(bar)
            self._refresh(bar)

    def _refresh(self, bar: progress.Bar) -> None:
        try:
            done, values, notes, resumptions, phase = ray.get(self.actor.read.remote(), timeout=5)
        except Exception:  # progress must never end a run
            return
        for text in notes[self._noted :]:
            self.listener.note("note", text)
        self._noted = len(notes)
        for round_ in resumptions[self._resumed :]:
            self.listener.note("train", resumption(round_))
        self._resumed = len(resumptions)
        bar.at(done, **losses_of(values))
        self._show(phase)

    def _show(self, phase: Phase | None) -> None:
        if phase is None or self._within is None or self._within[0] != phase[:3]:
            self._block.close()
            self._within = None
        if phase is not None:
            if self._within is None:
                self._within = phase[:3], self._block.enter_context(self.listener.bar(*phase[:3]))
            self._within[1].at(phase[3])
