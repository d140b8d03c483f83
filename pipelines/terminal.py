"""Terminal output."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ofmu_ray.progress import Bar, Listener

ARROWS = {"high": "^", "low": "v", "retrained": "~"}


def say(line: str) -> None:
    """Print a line of progress to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


class Terminal(Listener):
    """Lines on stderr, and bars if it is a terminal."""

    def __init__(self) -> None:
        self._bars: list[Any] = []

    def note(self, topic: str, text: str) -> None:
        line = f"{topic:<7} {text}" if topic else text
        if self._bars:
            self._bars[-1].write(line, file=sys.stderr)
            sys.stderr.flush()
        else:
            say(line)

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Bar]:
        from tqdm import tqdm

        shown = sys.stderr.isatty() and total > 0
        with tqdm(total=total, desc=title, unit=unit, disable=not shown) as bar:
            self._bars.append(bar)
            try:
                yield _Shown(bar)
            finally:
                self._bars.remove(bar)


class _Shown(Bar):
    def __init__(self, bar: Any) -> None:
        self.shown = bar

    def update(self, count: int = 1) -> None:
        self.shown.update(count)

    def at(self, done: int, **shown: str) -> None:
        self.shown.n = done
        self.shown.set_postfix(shown)


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
    lines.append("^ higher is better   v lower   ~ closest to the retrained model is best   [95 % interval]")
    lines += _reasons(metrics, columns, shown)
    return "\n".join(lines)


def _cell(metric: dict[str, Any] | None) -> str:
    if not metric or metric.get("value") is None:
        return "-"
    value, low, high = metric["value"], metric.get("low"), metric.get("high")
    form = _format(value)
    return form(value) if low is None or high is None else f"{form(value)} [{form(low)}, {form(high)}]"


def _format(value: float) -> Callable[[float], str]:
    """Three significant digits of a value; its interval has the same."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return "{:.2e}".format
    return f"{{:.{max(0, 2 - math.floor(math.log10(abs(value)))) if value else 3}f}}".format


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
