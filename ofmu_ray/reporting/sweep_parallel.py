"""Parallel coordinates: one vertical axis per option and outcome, one line per trial."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ofmu_ray.reporting.marks import COLOURS, Key, Plot, with_words
from ofmu_ray.reporting.plots import FAINT, INK, PAPER, inline_svg, new_axes

_SCORES = {f"#030a0{index}": f"var(--score-{index})" for index in range(1, 6)}
_CHOSEN = list(COLOURS)[1]
_OFF = -0.1  # place of what has none on its scale: an option that a trial does not have, zero on a logarithm
_LINE = "M1 4h14v2h-14Z"
_DASHED = "M1 4h4v2h-4ZM7 4h4v2h-4ZM13 4h2v2h-2Z"


@dataclass(frozen=True)
class Scale:
    """One vertical axis: where each trial stands, from 0 to 1, and the words beside it."""

    label: str
    places: Sequence[float]
    """[trials]; below 0: off the scale."""
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Trace:
    """One trial's line."""

    score: float
    """From 0, the worst, to 1."""
    enough: bool
    """Its utility reaches the floor."""
    chosen: bool
    words: str


def scale(label: str, values: Sequence[Any], log: bool = False, falling: bool = False) -> Scale:
    """Numbers by their size (`log`: by their logarithm, 0 off it), anything else by name; None stands off the scale."""
    there = [value for value in values if value is not None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        names = list(dict.fromkeys(json.dumps(value).strip('"') for value in there))
        step = 1 / max(len(names) - 1, 1)
        spots = {name: index * step if len(names) > 1 else 0.5 for index, name in enumerate(names)}
        places = [_OFF if value is None else spots[json.dumps(value).strip('"')] for value in values]
        return Scale(label, places, _with_off([(place, name) for name, place in spots.items()], values, "none"))
    kept = [value for value in there if not log or value > 0]
    low, high = (min(kept), max(kept)) if kept else (0.0, 1.0)
    span = math.log(high / low) if log and kept else high - low

    def place(value: float | None) -> float:
        if value is None or (log and value <= 0):
            return _OFF
        at = 0.5 if not span else (math.log(value / low) if log else value - low) / span
        return 1 - at if falling else at

    marks = [low] if low == high else [low, math.sqrt(low * high) if log else (low + high) / 2, high]
    if all(isinstance(value, int) for value in kept) and high - low <= 8:
        marks = list(range(int(low), int(high) + 1))
    ticks = [(place(value), f"{value:.2g}" if log else f"{value:.3g}") for value in marks] if kept else []
    return Scale(
        label, [place(value) for value in values], _with_off(ticks, values, "0" if log and 0 in there else "none")
    )


def _with_off(ticks: list[tuple[float, str]], values: Sequence[Any], words: str) -> list[tuple[float, str]]:
    off = any(value is None for value in values) or words == "0"
    both = words == "0" and any(value is None for value in values)
    return [(_OFF, "0, none" if both else words), *ticks] if off else ticks


def parallel_plot(title: str, scales: Sequence[Scale], traces: Sequence[Trace]) -> Plot:
    """Lines get darker and thicker with the score; those below the floor are dashed, the chosen one is drawn on top."""
    figure, axes = new_axes(max(7.4, 0.95 * len(scales)), 3.9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(visible=False)
    colours = list(_SCORES)
    x = np.arange(len(scales))
    for place, trace in sorted(enumerate(traces), key=lambda found: (found[1].chosen, found[1].score)):
        level = min(int(trace.score * len(colours)), len(colours) - 1)
        axes.plot(
            x, [one.places[place] for one in scales], color=_CHOSEN if trace.chosen else colours[level],
            linewidth=2.4 if trace.chosen else 0.8 + 0.25 * level, linestyle="-" if trace.enough else (0, (4, 2.5)),
            zorder=2, gid=f"point-{place}", solid_joinstyle="round",
        )  # fmt: skip
    for index, one in enumerate(scales):
        axes.plot([index, index], [0, 1], color=FAINT, linewidth=1, zorder=3)
        for at, text in one.ticks:
            axes.annotate(text, (index, at), xytext=(4, 0), textcoords="offset points", fontsize=7.5, color=INK,
                          va="center", zorder=4,
                          bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8, "alpha": 0.75})  # fmt: skip
    axes.set_xticks(x, [one.label.replace(".", ".\n").replace(" ", "\n") for one in scales])
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, labelsize=8.5, labeltop=True, labelbottom=False)
    axes.set_xlim(-0.15, len(scales) - 0.4)
    axes.set_ylim(-0.16, 1.05)
    keys = [Key("best fifth", "var(--score-5)", _LINE), Key("worst fifth", "var(--score-1)", _LINE)]
    keys += [Key("below the floor", "var(--score-3)", _DASHED)] * any(not trace.enough for trace in traces)
    keys += [Key("chosen", COLOURS[_CHOSEN], _LINE)] * any(trace.chosen for trace in traces)
    svg = inline_svg(figure, html.escape(title), {**COLOURS, **_SCORES})
    return Plot(title, with_words(svg, [trace.words for trace in traces]), keys, wide=True)
