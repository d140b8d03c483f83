"""Ends workers whose round takes too long, so that Ray Train restarts them from the last checkpoint.

A hung worker blocks all others in the next collective, so the watchdog of every rank expires and ends its own process.
Heartbeats to the progress actor show which rank hung: a stopped or swapped-out process sends none; a process whose loop
hangs reports where; ranks that only wait for it are inside torch.distributed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS = 75
"""Exit status of a process that its watchdog has ended (EX_TEMPFAIL)."""
LONGEST_INTERVAL_SECONDS = 5.0
WAITING = "torch.distributed"
PACKAGE = "ofmu_ray"


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a rank."""

    at: float
    """Seconds, by the progress actor's clock."""
    where: str
    """The function of this package that its loop is in, or `WAITING`."""


class Watchdog:
    """A thread next to the loop of one rank. `limit_seconds` None: nothing is watched."""

    def __init__(self, rank: int, limit_seconds: float | None, actor: Any):
        self.rank, self.limit, self.actor = rank, limit_seconds, actor
        self._loop = threading.get_ident()
        self._phase, self._since = "", 0.0
        self._closed = threading.Event()
        if limit_seconds is not None and actor is not None:
            self.interval = min(LONGEST_INTERVAL_SECONDS, limit_seconds / 10)
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def begin(self, phase: str) -> None:
        """The loop enters this phase, which may take `limit_seconds`."""
        self._since = time.monotonic()
        self._phase = phase

    def end(self) -> None:
        """The following code has no limit (somebody else decides)."""
        self._phase = ""

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self.interval):
            self.actor.sign.remote(self.rank, _where(self._loop))
            phase, spent = self._phase, time.monotonic() - self._since
            if phase and self.limit is not None and spent > self.limit:
                self._give_up(phase)

    def _give_up(self, phase: str) -> None:
        import ray

        try:
            now, signs = ray.get(self.actor.signs.remote(), timeout=10)
            text = f"{verdict(signs, now, self.interval, phase)} after training.round_timeout = {self.limit:g} s"
            ray.get(self.actor.note.remote(f"{text}; the workers restarted from the last checkpoint"), timeout=10)
        finally:
            os._exit(STATUS)  # the thread of the loop cannot be interrupted inside a collective


def verdict(signs: dict[int, Heartbeat], now: float, interval: float, phase: str) -> str:
    """Which rank hung, in words, from the last heartbeats of all ranks."""
    silent = [rank for rank, sign in sorted(signs.items()) if now - sign.at > 3 * interval + 1]
    if silent:
        return f"{_ranks(silent)} hung in {phase}: no sign of life"
    busy = [rank for rank, sign in sorted(signs.items()) if sign.where != WAITING]
    if busy:
        return f"{_ranks(busy)} hung in {phase}: still in {', '.join(sorted({signs[rank].where for rank in busy}))}"
    return f"{phase} hung: all ranks wait for each other"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _where(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "distributed" in path.parts and "torch" in path.parts:
            return WAITING
        if PACKAGE in path.parts:
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "another library"
