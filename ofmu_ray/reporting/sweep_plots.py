"""Plots of the sweep's page: the plane of all trials, importance of options, best so far against cost."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ofmu_ray.attacks.importance import Importance
from ofmu_ray.metrics.fronts import pareto_front
from ofmu_ray.reporting import figures
from ofmu_ray.reporting.marks import COLOURS, SHAPES, Key, Plot, with_words
from ofmu_ray.reporting.plots import FAINT, INK, inline_svg, new_axes
from ofmu_ray.reporting.sweep_results import Axis, noun

_C = list(COLOURS)
# kind of point -> (colour, marker, filled): each has a shape of its own; filled ones have a result
_KINDS = {
    "ran to its end": (_C[0], "o", True),
    "fresh seed": (_C[2], "^", True),
    "ended early by the scheduler": (_C[7], "v", False),
    "ended by itself before its last round": (_C[5], "s", True),
    "failed on the way": (_C[6], "D", False),
}
_STATUSES = {
    "stopped": "ended early by the scheduler",
    "utility_floor": "ended by itself before its last round",
    "non_finite": "ended by itself before its last round",
    "failed": "failed on the way",
}


def kind_of(status: str, phase: str) -> str:
    """The legend's words for a trial."""
    known = _STATUSES.get(status)
    return known or ("fresh seed" if phase == "confirm" else "ran to its end")


@dataclass(frozen=True)
class Point:
    """One trial in the plane."""

    x: float
    y: float
    """On the objective's axis (Axis.place)."""
    kind: str
    words: str
    """Shown on hover."""
    front: bool = False
    chosen: bool = False


def plane(
    title: str, points: Sequence[Point], references: Mapping[str, Point], floor: float | None, axis: Axis, x_label: str
) -> Plot:
    """Every trial and the reference models; the front as a line, the floor as another, the chosen trial ringed."""
    figure, axes = new_axes(7.4, 4.4)
    if axis.log:
        axes.set_yscale("log")
    if floor is not None:
        axes.axvline(floor, color=FAINT, linewidth=1, linestyle="--")
        axes.annotate("floor", (floor, 0.0), xycoords=("data", "axes fraction"), xytext=(3, 3),
                      textcoords="offset points", color=INK, fontsize=8)  # fmt: skip
    front = [point for point in points if point.front]
    sign = -1.0 if axis.falling else 1.0
    steps = [front[place] for place in pareto_front([(point.x, sign * point.y) for point in front])]
    axes.plot([p.x for p in steps], [p.y for p in steps], color=_C[0], linewidth=1.3, drawstyle="steps-pre", zorder=2)
    for place, point in enumerate(points):
        colour, marker, filled = _KINDS[point.kind]
        axes.plot(point.x, point.y, marker, color=colour, markersize=6.5, fillstyle="full" if filled else "none",
                  markeredgewidth=0 if filled else 1.2, zorder=4 if filled else 3, gid=f"point-{place}")  # fmt: skip
        if point.chosen:
            axes.plot(point.x, point.y, "o", color=INK, fillstyle="none", markersize=13, markeredgewidth=1.5, zorder=5)
    shown = [*points, *references.values()]
    middle = (min(p.x for p in shown) + max(p.x for p in shown)) / 2
    for place, (name, point) in enumerate(references.items(), start=len(points)):
        axes.plot(point.x, point.y, "*" if name == "retrained" else "X", color=INK, markersize=10, zorder=6,
                  markeredgewidth=0, gid=f"point-{place}", clip_on=False)  # fmt: skip
        side = -1 if point.x > middle else 1
        axes.annotate(name, (point.x, point.y), xytext=(8 * side, 0), textcoords="offset points", color=INK,
                      fontsize=8.5, ha="right" if side < 0 else "left", va="center")  # fmt: skip
    if axis.falling:
        axes.invert_yaxis()
    axes.set_xlabel(x_label)
    axes.set_ylabel(axis.label)
    kinds = [kind for kind in _KINDS if any(point.kind == kind for point in points)]
    legend = [_key(kind, *_KINDS[kind]) for kind in kinds]
    legend += [Key("chosen", "var(--ink)", SHAPES["o"], filled=False)] * any(point.chosen for point in points)
    return Plot(title, _svg(figure, title, [point.words for point in shown]), legend, wide=True)


def _key(label: str, colour: str, marker: str, filled: bool) -> Key:
    return Key(label, COLOURS[colour], SHAPES[marker], filled)


def _svg(figure: Any, title: str, words: Sequence[str]) -> str:
    return with_words(inline_svg(figure, html.escape(title), COLOURS), words)


def importance_plot(title: str, found: Mapping[str, Sequence[Importance]], names: Callable[[str], str]) -> Plot:
    """Share of each option with its interval, of each figure; filled where shuffled outcomes seldom give as much."""
    order = [row.option for row in next(iter(found.values()))]
    figure, axes = new_axes(7.4, 0.8 + 0.42 * len(order))
    words: list[str] = []
    legend: list[Key] = []
    for index, (name, rows) in enumerate(found.items()):
        colour, marker = _C[index], ("o", "s")[index]
        for row in rows:
            y = order.index(row.option) + (index - (len(found) - 1) / 2) * 0.34
            axes.plot([row.low, row.high], [y, y], color=colour, linewidth=1.3, zorder=2)
            axes.plot(row.share, y, marker, color=colour, markersize=6.5, markeredgewidth=1.3, zorder=3,
                      fillstyle="full" if row.p_value < 0.05 else "none", gid=f"point-{len(words)}")  # fmt: skip
            words.append(f"{row.option}, {noun(name)}: {importance_words(row)}")
        legend.append(_key(noun(name), colour, marker, True))
    axes.set_yticks(range(len(order)), [names(option) for option in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(0, min(1.0, 1.06 * max(row.high for rows in found.values() for row in rows)))
    axes.set_xlabel("share of the importance of all options")
    return Plot(title, _svg(figure, title, words), legend, wide=True)


def importance_words(row: Importance) -> str:
    """0.62 (0.41 – 0.75), p = 0.010."""
    return f"{row.share:.2f} ({row.low:.2f} – {row.high:.2f}), p = {figures.number(row.p_value)}"


@dataclass(frozen=True)
class Reached:
    """A trial that came to its end, when it did."""

    cost: float
    """FLOPs or seconds since the sweep began."""
    y: float
    enough: bool
    words: str


def progress_plot(title: str, reached: Sequence[Reached], end: float, axis: Axis, unit: tuple[str, float]) -> Plot:
    """Each finished trial, and the best with enough utility so far, over what was spent up to then.

    `reached`: in the order of cost; `end`: all that was spent; `unit`: of the axis, and its size.
    """
    figure, axes = new_axes(4.6, 3.0)
    words, size = [trial.words for trial in reached], unit[1]
    if axis.log:
        axes.set_yscale("log")
    best: list[float] = []
    costs: list[float] = []
    for place, trial in enumerate(reached):
        axes.plot(trial.cost / size, trial.y, "o", color=_C[0] if trial.enough else _C[7], markersize=5.5,
                  fillstyle="full" if trial.enough else "none", markeredgewidth=0 if trial.enough else 1.2,
                  zorder=3, gid=f"point-{place}")  # fmt: skip
        better = min if axis.falling else max
        if trial.enough and (not best or better(trial.y, best[-1]) != best[-1]):
            costs.append(trial.cost / size)
            best.append(trial.y)
    if best:
        axes.plot([*costs, end / size], [*best, best[-1]], color=_C[0], linewidth=1.5, drawstyle="steps-post")
    if axis.falling:
        axes.invert_yaxis()
    axes.set_xlim(0, 1.03 * end / size)
    axes.set_xlabel(unit[0])
    axes.set_ylabel(axis.label)
    legend = [_key("enough utility; line: best so far", _C[0], "o", True)] * any(t.enough for t in reached)
    legend += [_key("below the floor", _C[7], "o", False)] * any(not t.enough for t in reached)
    return Plot(title, _svg(figure, title, words), legend)
