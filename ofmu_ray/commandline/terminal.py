"""Terminal output."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ofmu_ray.progress import Bar, Listener

ARROWS = {"high": "^", "low": "v", "retrained": "~", "zero": "0", "depends": " "}


def say(line: str) -> None:
    """Print a line of progress to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


LINE_SECONDS = 15.0
"""Between two log lines of a phase where stderr is not a terminal."""
SPEED_SECONDS = 3600.0
"""A bar's speed, and with it the time left, is that of the reports of so many seconds."""


class Terminal(Listener):
    """Lines on stderr; progress as bars if it is a terminal, otherwise as log lines."""

    def __init__(self, seconds: float = LINE_SECONDS) -> None:
        self.seconds = seconds
        self._bars: Any = None
        self._shown = 0

    def note(self, topic: str, text: str) -> None:
        line = f"{topic:<7} {text}" if topic else text
        if self._bars is None:
            say(line)
        else:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Bar]:
        if total <= 0 or not sys.stderr.isatty():
            yield _LogLines(self, title, total, unit)
            return
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        task = self._bars.add_task(title, total=total, unit=unit, values="")
        self._shown += 1
        try:
            yield _ScreenBar(self._bars, task)
        finally:
            self._bars.remove_task(task)
            self._shown -= 1
            if self._shown == 0:
                self._bars.stop()
                self._bars = None


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}  {task.fields[values]}"),
        TimeRemainingColumn(),
    )
    # rich's own 30 s would show no time left where a round takes longer
    return Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=SPEED_SECONDS)


class _ScreenBar(Bar):
    def __init__(self, bars: Any, task: Any) -> None:
        self.bars, self.task = bars, task

    def update(self, count: int = 1) -> None:
        self.bars.advance(self.task, count)

    def at(self, done: int, **shown: str) -> None:
        self.bars.update(self.task, completed=done, values=_named(shown))


class _LogLines(Bar):
    """A line every few seconds, with the time left from the second report on."""

    def __init__(self, terminal: Terminal, title: str, total: int, unit: str) -> None:
        self.terminal, self.title, self.total, self.unit = terminal, title, total, unit
        self.done = 0
        self.first: tuple[int, float] | None = None
        """Work done at the first report, and its time: what came before is no measure of speed."""
        self.last = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.at(self.done + count)

    def at(self, done: int, **shown: str) -> None:
        now = time.monotonic()
        self.done = done
        if done and self.first is None:
            self.first = (done, now)
        if not done or now - self.last < self.terminal.seconds:
            return
        self.last = now
        parts = [f"{self.unit} {done} of {self.total}", _named(shown), self._left(now)]
        self.terminal.note(self.title, ", ".join(part for part in parts if part))

    def _left(self, now: float) -> str:
        assert self.first is not None
        done, began = self.first
        if self.done <= done or self.done >= self.total:
            return ""
        seconds = (now - began) / (self.done - done) * (self.total - self.done)
        return f"about {datetime.timedelta(seconds=round(seconds))} left"


def _named(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def plain_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells in columns, the first line the heads."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def metrics_table(metrics: Mapping[str, Any], models: Sequence[str] = ("before", "after", "retrained")) -> str:
    """The models side by side, one metric per line, with 95 % intervals."""
    from ofmu_ray.metrics.registry import metric

    columns = [name for name in models if metrics.get(name)]
    shown = [metric(name) for name in dict.fromkeys(name for model in columns for name in metrics[model])]
    shown = [one for one in shown if one.headline]
    lines = [f"{'':26}" + "".join(f"{name:>30}" for name in columns)]
    for one in shown:
        cells = [_cell(metrics[name].get(one.name)) for name in columns]
        lines.append(f"{one.label + ' ' + ARROWS[one.better]:26}" + "".join(f"{cell:>30}" for cell in cells))
    zero = "   0 closest to 0" if any(one.better == "zero" for one in shown) else ""
    lines.append(f"^ higher is better   v lower   ~ closest to the retrained model is best{zero}   [95 % interval]")
    lines += _reasons(metrics, columns, shown)
    return "\n".join(lines)


def _cell(metric: dict[str, Any] | None) -> str:
    if not metric or metric.get("value") is None:
        return "-"
    from ofmu_ray.reporting.formats import with_interval

    return with_interval(metric)


def _reasons(metrics: Mapping[str, Any], columns: Sequence[str], shown: Sequence[Any]) -> list[str]:
    """Why values are missing, one line per reason."""
    missing: dict[str, dict[str, None]] = {}
    for one in shown:
        for name in columns:
            entry = metrics[name].get(one.name)
            if entry and entry.get("value") is None and entry.get("reason"):
                missing.setdefault(entry["reason"], {})[one.label] = None
    return [f"- {', '.join(labels)}: {reason}" for reason, labels in missing.items()]


LONGEST_ANSWER = 160


def samples(rows: Sequence[Mapping[str, str]]) -> str:
    """Questions with the answers before and after."""

    def short(text: str) -> str:
        text = " ".join(text.split()) or "(empty)"
        return text if len(text) <= LONGEST_ANSWER else f"{text[:LONGEST_ANSWER]}..."

    shown = [f"\n{row['question']}\n  before  {short(row['before'])}\n  after   {short(row['after'])}" for row in rows]
    return "\n".join(shown)
