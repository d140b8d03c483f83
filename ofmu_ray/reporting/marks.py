"""Plots of marked points with text on hover and a legend drawn by the page; also as standalone files."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ofmu_ray.reporting.page import page_environment

COLOURS = {f"#020a0{index}": f"var(--method-{index})" for index in range(1, 9)}
SHAPES = {
    "o": "M8 1.6a3.4 3.4 0 1 1 0 6.8a3.4 3.4 0 1 1 0 -6.8Z",
    "s": "M4.9 1.9h6.2v6.2h-6.2Z",
    "^": "M8 1.2L11.9 8.2H4.1Z",
    "D": "M8 .9L12.1 5L8 9.1L3.9 5Z",
    "v": "M8 8.8L11.9 1.8H4.1Z",
    "P": "M6.7 1.2h2.6v2.5h2.5v2.6h-2.5v2.5H6.7V6.3H4.2V3.7h2.5Z",
}


# Layout of a standalone file's legend, in points: SVG cannot wrap text.
_MARGIN, _LINE, _KEY, _CHARACTER = 8.0, 15.0, 20.0, 5.0


@dataclass(frozen=True)
class Key:
    """One legend entry. The page draws the legend itself so that it wraps on a phone."""

    label: str
    colour: str
    """CSS colour."""
    shape: str
    """SVG path in a box of 16 x 10."""
    filled: bool = True


@dataclass(frozen=True)
class Plot:
    """A plot with its legend."""

    title: str
    svg: str
    legend: Sequence[Key]
    wide: bool = False


def with_words(svg: str, words: Sequence[str]) -> str:
    """Give each point the text shown on hover; drop the ids, because several plots share a page."""
    return re.sub(r'<g id="point-(\d+)">', lambda match: f"<g><title>{html.escape(words[int(match[1])])}</title>", svg)


def standalone_svg(plot: Plot) -> str:
    """The plot as a standalone SVG file with title, legend, colours and background."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot.svg)
    assert box is not None, "plots have a view box"
    width, height = float(box[1]), float(box[2])
    entries, x, y = [], _MARGIN, 2 * _LINE
    for key in plot.legend:
        room = _KEY + _CHARACTER * len(key.label) + _MARGIN
        if x > _MARGIN and x + room > width:
            x, y = _MARGIN, y + _LINE
        paint = f"fill:{key.colour}" if key.filled else f"fill:none;stroke-width:1.5;stroke:{key.colour}"
        entries.append(
            f'<path transform="translate({x:.1f} {y - 8:.1f})" d="{key.shape}" style="{paint}"/>'
            f'<text x="{x + _KEY:.1f}" y="{y:.1f}" font-size="9">{html.escape(key.label)}</text>'
        )
        x += room
    top = y + (0.6 if plot.legend else -0.4) * _LINE
    style = page_environment().get_template("colours.css.j2").render()
    inner = plot.svg.replace("<svg", f'<svg x="0" y="{top:.1f}" width="{width}" height="{height}"', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height + top:.1f}">\n<style>{style}text {{ font-family: system-ui, sans-serif; '
        f"fill: var(--ink); }}</style>\n"
        f'<rect width="100%" height="100%" style="fill:var(--paper)"/>\n'
        f'<text x="{_MARGIN}" y="{_LINE:.1f}" font-size="11" font-weight="600">{html.escape(plot.title)}</text>\n'
        f"{''.join(entries)}\n{inner}\n</svg>\n"
    )
