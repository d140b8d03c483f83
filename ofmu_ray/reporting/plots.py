"""Plots of the page as inline SVG; the colours are CSS variables, so plots follow light and dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Placeholder colours that matplotlib writes into the SVG, and the CSS variable that replaces each.
INK, FAINT, GRID, PAPER = "#010101", "#020202", "#030303", "#010303"
_COLOURS = ("#010a01", "#010a02", "#010a03", "#010a04")
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--line)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{index + 1})" for index, colour in enumerate(_COLOURS)},
}
MODEL_COLOURS = {"before": _COLOURS[1], "after": _COLOURS[0], "retrained": _COLOURS[2]}
_DASHES = ("-", "--", ":", "-.")  # lines differ without colour, too
_LEGEND_DASHES = ("", "5 2.5", "1.5 2.5", "6 2 1.5 2")  # the same as stroke-dasharray


@dataclass(frozen=True)
class SeriesPlot:
    """One panel of per-round series."""

    title: str
    names: dict[str, str]
    """Series -> its label in the legend."""
    log: bool = False
    """Logarithmic axis if all values are positive."""
    from_zero: bool = False
    """The axis starts at 0."""


@dataclass(frozen=True)
class LegendEntry:
    """One line of a panel. The page draws the legend itself so that it wraps on a phone."""

    label: str
    colour: str
    """CSS colour."""
    dashes: str
    """SVG stroke-dasharray; empty: solid."""


@dataclass(frozen=True)
class Panel:
    """A plot as the page shows it."""

    title: str
    svg: str
    legend: list[LegendEntry]
    """Empty for a single line."""


SERIES_PLOTS = (
    SeriesPlot("Loss (nats per token)", {"loss": "train", "forget_loss": "forget", "retain_loss": "retain"}),
    SeriesPlot("Cosine of the gradients", {"gradient_cosine": "cos(g_f, g_r)"}),
    SeriesPlot(
        "Gradient norms",
        {
            "gradient_norm": "gradient",
            "phi_gradient_norm": "|∇Φ|",
            "inner_gradient_norm": "inner steps, mean",
            "outer_gradient_norm": "outer step",
            "penalty_norm": "penalty",
        },
        log=True,
    ),
    SeriesPlot("Penalty weight ρ", {"rho": "ρ"}, from_zero=True),
    SeriesPlot("Learning rates", {"lr": "lr", "inner_lr": "inner", "outer_lr": "outer"}, from_zero=True),
    SeriesPlot("Gradient passes, cumulative", {"forget_passes": "forget", "retain_passes": "retain"}, from_zero=True),
    SeriesPlot("Ascents skipped, nothing left to forget", {"skipped_ascents": "skipped"}, from_zero=True),
    SeriesPlot("Tokens per second", {"tokens_per_second": "tokens/s"}, from_zero=True),
    SeriesPlot("Utility (watched retain rows)", {"utility": "mean answer probability"}),
)


def series_panels(series: Sequence[Mapping[str, float]]) -> list[Panel]:
    """Every panel that has values; each series without a predefined panel gets its own."""
    present = list(dict.fromkeys(name for row in series for name in row if name != "round"))
    known = {name for plot in SERIES_PLOTS for name in plot.names}
    plots = [*SERIES_PLOTS, *(SeriesPlot(name, {name: name}) for name in present if name not in known)]
    panels = []
    for plot in plots:
        lines = {text: _line(series, name) for name, text in plot.names.items() if name in present}
        lines = {text: line for text, line in lines.items() if len(line[0])}
        unused = plot.from_zero and not any(any(values) for _, values in lines.values())  # a penalty that is off
        if lines and not unused:
            panels.append(_series_panel(plot, lines))
    return panels


Line = tuple[list[float], list[float]]


def _line(series: Sequence[Mapping[str, float]], name: str) -> Line:
    """(rounds, values) of a series, without missing or non-finite values."""
    points = [
        (row.get("round", index + 1), row[name])
        for index, row in enumerate(series)
        if row.get(name) is not None and math.isfinite(row[name])
    ]
    return [x for x, _ in points], [y for _, y in points]


def _series_panel(plot: SeriesPlot, lines: Mapping[str, Line]) -> Panel:
    figure, axes = new_axes(4.2, 2.5)
    for index, (rounds, values) in enumerate(lines.values()):
        marker = "o" if len(rounds) <= 40 else ""
        axes.plot(
            rounds, values, color=_COLOURS[index % len(_COLOURS)], linestyle=_DASHES[index % len(_DASHES)],
            linewidth=1.5, marker=marker, markersize=2.5,
        )  # fmt: skip
    if plot.log and all(value > 0 for _, values in lines.values() for value in values):
        axes.set_yscale("log")
    if plot.from_zero:
        axes.set_ylim(0, 1.05 * max(max(values) for _, values in lines.values()) or 1.0)
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    colours = [_COLOURS[index % len(_COLOURS)] for index in range(len(lines))]
    return Panel(plot.title, inline_svg(figure, plot.title), _legend(list(lines), colours) if len(lines) > 1 else [])


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """Two-sample KS test between the truth ratios of a model and of the retrained model on the forget rows."""

    p_value: float
    distance: float
    """Largest vertical distance between the two distribution functions."""
    location: float
    """Truth ratio at which it occurs."""
    low: float
    """The lower of the two distribution functions there."""
    rows: int


def kolmogorov_smirnov(ratios: NDArray[np.float64], retrained: NDArray[np.float64]) -> KolmogorovSmirnov:
    """The test and where its distance occurs (the smallest ratio that attains it)."""
    from ofmu_ray.metrics.functions import forget_quality

    p_value, distance = forget_quality(ratios, retrained)
    points = np.sort(np.concatenate([ratios, retrained]))
    one, two = _ecdf(ratios, points), _ecdf(retrained, points)
    at = int(np.argmax(np.abs(one - two)))
    low = float(min(one[at], two[at]))
    return KolmogorovSmirnov(p_value, distance, float(points[at]), low, len(ratios))


def truth_ratio_panel(ratios: Mapping[str, NDArray[np.float64]], marked: KolmogorovSmirnov | None) -> Panel:
    """Distribution functions of the forget rows' truth ratios by model; `marked`: the KS distance to draw."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = new_axes(5.4, 3.0)
    for index, (model, values) in enumerate(ratios.items()):
        ordered = np.sort(values)
        heights = np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(
            np.concatenate([ordered[:1], ordered]), np.concatenate([[0.0], heights]), where="post",
            color=MODEL_COLOURS.get(model, FAINT), linestyle=_DASHES[index % len(_DASHES)], linewidth=1.8,
        )  # fmt: skip
    if marked is not None:
        top = marked.low + marked.distance
        axes.plot([marked.location] * 2, [marked.low, top], color=INK, linewidth=2.2)
        axes.annotate(
            f"D = {marked.distance:.3f}", (marked.location, marked.low + marked.distance / 2),
            xytext=(7, 0), textcoords="offset points", color=INK, fontsize=9, va="center",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    every = np.concatenate(list(ratios.values()))
    if every.min() > 0 and every.max() / every.min() > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1.0, color=FAINT, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("truth ratio of a forget row, P(wrong) / P(right)")
    axes.set_ylabel("share of rows")
    title = "Truth ratios of the forget rows"
    colours = [MODEL_COLOURS.get(model, FAINT) for model in ratios]
    return Panel(title, inline_svg(figure, title), _legend(list(ratios), colours))


def _ecdf(values: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.searchsorted(np.sort(values), points, side="right") / len(values)


# --------------------------------------------------------------------------------------------------- matplotlib


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """A new figure (no pyplot, global state or display) with the page's colours, sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    with_page_colours(axes)
    return figure, axes


def with_page_colours(axes: Any) -> None:
    """Give a plot's lines, ticks and text the page's colours, on the page's background."""
    axes.figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=8.5, which="both")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(9)
        axis.get_offset_text().set_color(INK)
        axis.get_offset_text().set_fontsize(8.5)


def _legend(labels: Sequence[str], colours: Sequence[str]) -> list[LegendEntry]:
    return [
        LegendEntry(text, _VARIABLES[colour], _LEGEND_DASHES[index % len(_LEGEND_DASHES)])
        for index, (text, colour) in enumerate(zip(labels, colours, strict=True))
    ]


def inline_svg(figure: Any, title: str, colours: Mapping[str, str] = MappingProxyType({})) -> str:
    """The figure as an <svg> element that scales with the page; the same figure gives the same text.

    `title`: its accessible name, already escaped for an attribute. `colours`: further placeholders and their
    replacements.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in {**_VARIABLES, **colours}.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
