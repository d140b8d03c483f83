"""Progress reports from library code, and their listener: a terminal, log lines, a test, or none.

Library code calls `note` and `bar`; it never prints. The caller chooses the listener:

    with listening(TerminalListener()):
        outcome = run(config)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Bar:
    """Work of a known size. This one shows nothing; listeners override both methods."""

    def update(self, count: int = 1) -> None:
        """`count` more units are done."""

    def at(self, done: int, **shown: str) -> None:
        """`done` units are done in total; `shown`: values of the last one by name."""


class Listener:
    """Receives progress reports. Methods do nothing by default, and must not raise."""

    def note(self, topic: str, text: str) -> None:
        """One line: `topic` is a word (run, data, train, stop, note, ...)."""

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Bar]:
        """Work of `total` units that runs in the block."""
        yield Bar()

    def started(self, run: Any) -> None:
        """A run starts or resumes; `run`: ofmu_ray.runs.this_run.Run."""

    def ended(self, run: Any, outcome: Any) -> None:
        """A run ended; `outcome`: ofmu_ray.runs.outcome.Outcome, or None if an exception ended it."""


_CURRENT: ContextVar[Listener] = ContextVar("listener", default=Listener())  # noqa: B039 (it holds no state)


@contextmanager
def listening(listener: Listener) -> Iterator[Listener]:
    """Send all progress of the block to `listener`."""
    token = _CURRENT.set(listener)
    try:
        yield listener
    finally:
        _CURRENT.reset(token)


def current() -> Listener:
    """The current listener. A new thread starts without one: pass it in."""
    return _CURRENT.get()


def note(topic: str, text: str) -> None:
    """Report one line."""
    current().note(topic, text)


def bar(title: str, total: int, unit: str) -> Any:
    """A context manager: a `Bar` for `total` units of work."""
    return current().bar(title, total, unit)
