"""What a person sees on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

SHOWN = (
    ("forget_quality", "forget quality", "match"),
    ("forget_truth_ratio", "forget truth ratio", "match"),
    ("forget_probability", "forget probability", "match"),
    ("forget_rouge", "forget ROUGE-L", "match"),
    ("model_utility", "model utility", "up"),
    ("retain_probability", "retain probability", "up"),
    ("retain_rouge", "retain ROUGE-L", "up"),
)


def say(line: str) -> None:
    """A line of progress, on stderr so that stdout stays for results."""
    print(line, file=sys.stderr, flush=True)


def metrics_table(metrics: dict[str, Any], models: Sequence[str] = ("before", "after", "retrained")) -> str:
    """The models side by side, one metric a line, with 95 % intervals."""
    columns = [name for name in models if metrics.get(name)]
    lines = [f"{'':22}" + "".join(f"{name:>28}" for name in columns)]
    for key, title, direction in SHOWN:
        arrow = "^" if direction == "up" else "~"
        cells = [_cell(metrics[name].get(key)) for name in columns]
        lines.append(f"{title + ' ' + arrow:22}" + "".join(f"{cell:>28}" for cell in cells))
    lines.append("^ higher is better   ~ best where it matches the retrained model   [95 % interval]")
    return "\n".join(lines)


def _cell(figure: dict[str, Any] | None) -> str:
    if not figure or figure.get("value") is None:
        return "-"
    value, low, high = figure["value"], figure.get("low"), figure.get("high")
    if low is None or high is None:
        return f"{value:.3g}"
    return f"{value:.3g} [{low:.2g}, {high:.2g}]"
