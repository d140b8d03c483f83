"""Plots of the benchmark's page: the plane of forgetting and utility, cost against quality, sensitivity to options."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ofmu_ray.metrics.fronts import Sensitivity, pareto_front
from ofmu_ray.reporting.marks import COLOURS, SHAPES, Key, Plot, with_words
from ofmu_ray.reporting.plots import FAINT, INK, inline_svg, new_axes


@dataclass(frozen=True)
class Point:
    """One run in a plane."""

    x: float
    y: float
    words: str
    """Shown on hover."""
    reported: bool = True
    """A reported run (solid); else a tuning trial (faint)."""
    degenerate: bool = False
    """Drawn hollow, and on no front."""


# Methods differ in shape as well as in colour; 24 combinations before a pair repeats.
def _style(index: int) -> tuple[str, str]:
    """(matplotlib colour, marker) of the n-th method."""
    colours, markers = list(COLOURS), list(SHAPES)
    return colours[index % len(colours)], markers[index % len(markers)]


def _keys(methods: Sequence[str]) -> list[Key]:
    styles = [_style(index) for index in range(len(methods))]
    return [Key(name, COLOURS[colour], SHAPES[marker]) for name, (colour, marker) in zip(methods, styles, strict=True)]


def plane(
    title: str,
    points: Mapping[str, Sequence[Point]],
    references: Mapping[str, Point],
    floor: float | None,
    x_label: str,
    y_label: str,
) -> Plot:
    """Every run of every method with each method's Pareto front; the utility floor as a line."""
    figure, axes = new_axes(7.4, 4.3)
    words: list[str] = []
    if floor is not None:
        axes.axvline(floor, color=FAINT, linewidth=1, linestyle="--")
        axes.annotate("floor", (floor, 1.0), xycoords=("data", "axes fraction"), xytext=(-3, -2),
                      textcoords="offset points", color=INK, fontsize=8, ha="right", va="top")  # fmt: skip
    for index, runs in enumerate(points.values()):
        colour, marker = _style(index)
        sound = [run for run in runs if not run.degenerate]
        front = [sound[place] for place in pareto_front([(run.x, run.y) for run in sound])]
        axes.plot(
            [run.x for run in front], [run.y for run in front], color=colour, linewidth=1.2, drawstyle="steps-pre",
            alpha=0.8, zorder=2,
        )  # fmt: skip
        for run in runs:
            look = {"alpha": 1.0, "markersize": 7.0, "zorder": 4} if run.reported else {"alpha": 0.4, "markersize": 5.0}
            hollow = {"fillstyle": "none", "markeredgewidth": 1.2} if run.degenerate else {"markeredgewidth": 0}
            axes.plot(run.x, run.y, marker, color=colour, gid=f"point-{len(words)}", **look, **hollow)
            words.append(run.words)
    for name, run in references.items():
        axes.plot(run.x, run.y, "*" if name == "retrained" else "X", color=INK, markersize=9, zorder=5,
                  markeredgewidth=0, gid=f"point-{len(words)}", clip_on=False)  # fmt: skip
        side = -1 if run.x > 0.5 else 1
        axes.annotate(name, (run.x, run.y), xytext=(7 * side, -3 if name == "retrained" else 5),
                      textcoords="offset points", color=INK, fontsize=8.5, ha="right" if side < 0 else "left",
                      va="top" if name == "retrained" else "bottom")  # fmt: skip
        words.append(run.words)
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"forgetting, {y_label}")
    axes.set_ylim(0, 1.03)
    lowest = min(run.x for runs in (*points.values(), list(references.values())) for run in runs)
    axes.set_xlim(left=max(0.0, lowest - 0.05))
    return Plot(
        title, with_words(inline_svg(figure, html.escape(title), COLOURS), words), _keys(list(points)), wide=True
    )


def cost_plot(title: str, points: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> Plot:
    """What the reported runs cost, against what they reached."""
    figure, axes = new_axes(7.4, 3.0)
    words: list[str] = []
    for index, runs in enumerate(points.values()):
        colour, marker = _style(index)
        for run in runs:
            axes.plot(run.x, run.y, marker, color=colour, markeredgewidth=0, markersize=7, gid=f"point-{len(words)}")
            words.append(run.words)
    costs = [run.x for runs in points.values() for run in runs]
    if min(costs) > 0 and max(costs) / min(costs) > 8:
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, 1.06 * max(costs))
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return Plot(
        title, with_words(inline_svg(figure, html.escape(title), COLOURS), words), _keys(list(points)), wide=True
    )


def sensitivity_plot(title: str, sensitivity: Sensitivity, objective: str, utility: str) -> Plot:
    """One option against both outcomes of the tuning trials; each outcome has its own axis."""
    figure, axes = new_axes(3.9, 2.3)
    colours = list(COLOURS)
    axes.plot(sensitivity.values, sensitivity.objective, "o", color=colours[0], markersize=5, markeredgewidth=0)
    other = axes.twinx()
    other.plot(
        sensitivity.values,
        sensitivity.utility,
        "s",
        color=colours[1],
        markersize=5,
        fillstyle="none",
        markeredgewidth=1.3,
    )
    for axis, colour in ((axes, colours[0]), (other, colours[1])):
        axis.tick_params(axis="y", labelcolor=colour, colors=FAINT, labelsize=8)
        axis.tick_params(axis="y", labelcolor=colour)
        axis.margins(y=0.12)
    for side in ("top", "left", "bottom"):
        other.spines[side].set_visible(False)
    other.spines["right"].set_color(FAINT)
    if sensitivity.objective.min() > 0 and sensitivity.objective.max() / sensitivity.objective.min() > 100:
        axes.set_yscale("log")
    if sensitivity.values.min() > 0 and sensitivity.values.max() / sensitivity.values.min() > 8:
        axes.set_xscale("log")
    axes.set_xlabel(sensitivity.option)
    return Plot(
        title,
        inline_svg(figure, html.escape(title), COLOURS),
        [
            Key(
                f"{objective} (left), {_correlation(sensitivity.objective_correlation)}", "var(--method-1)", SHAPES["o"]
            ),
            Key(
                f"{utility} (right), {_correlation(sensitivity.utility_correlation)}",
                "var(--method-2)",
                SHAPES["s"],
                False,
            ),
        ],
    )


def _correlation(value: float | None) -> str:
    return "no rank correlation" if value is None else f"rank correlation {value:+.2f}"
