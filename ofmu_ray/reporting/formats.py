"""Labels, directions and number formats of metrics, shared by the page and the model card."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ofmu_ray.config.training import resolved_engine
from ofmu_ray.metrics.registry import metric

UP, DOWN, MATCH = "↑ better", "↓ better", "match retrained"
_DIRECTIONS = {"high": UP, "low": DOWN, "zero": "0", "retrained": MATCH, "depends": ""}
MODELS = ("before", "after", "retrained")


@dataclass(frozen=True)
class MetricCell:
    """One model's value in the table."""

    text: str
    interval: str = ""
    reason: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MetricRow:
    """One metric over the models."""

    name: str
    label: str
    direction: str
    cells: dict[str, MetricCell]
    rows: int | None

    @property
    def measured(self) -> bool:
        """Whether a model has a value; a metric that says why none has is not."""
        return any(cell.value is not None for cell in self.cells.values()) or not self.reasons

    @property
    def reasons(self) -> list[str]:
        """Why values are absent."""
        return list(dict.fromkeys(cell.reason for cell in self.cells.values() if cell.reason))


def label(name: str) -> str:
    """forget_truth_ratio -> Forget truth ratio."""
    return metric(name).label


def direction(name: str) -> str:
    """Which way is better. On forget rows, the aim is the score of a model that never saw them."""
    return _DIRECTIONS[metric(name).better]


def engine_name(training: Mapping[str, Any]) -> str:
    """The engine of a run's `training` options, as `torch` or `deepspeed ZeRO-2`; empty if they name none."""
    if not training.get("engine"):
        return ""
    name = resolved_engine(training["engine"], training.get("workers", 1), training.get("offload", "none"))
    return f"{name} ZeRO-{training['zero_stage']}" if name == "deepspeed" else name


def metric_table(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """The before/after/retrained table from metrics.json, in its order; absent values have a reason."""
    names = list(dict.fromkeys(name for model in MODELS for name in (metrics.get(model) or {})))
    rows = []
    for name in names:
        values = {model: (metrics.get(model) or {}).get(name) for model in MODELS}
        counts = [value["n"] for value in values.values() if value and value.get("n") is not None]
        cells = {model: cell(value) for model, value in values.items()}
        rows.append(MetricRow(name, label(name), direction(name), cells, max(counts, default=None)))
    return rows


def missing(rows: Iterable[MetricRow]) -> dict[str, list[str]]:
    """Reason -> labels of the metrics that lack a value for it."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.reasons:
            labels.setdefault(reason, []).append(row.label)
    return labels


def cell(metric_value: Mapping[str, Any] | None) -> MetricCell:
    """Text of one value with its 95 % interval; a dash with the reason if it is absent."""
    if metric_value is None:
        return MetricCell("–")
    if metric_value.get("value") is None:
        return MetricCell("–", reason=str(metric_value.get("reason") or ""))
    value, low, high = (metric_value.get(key) for key in ("value", "low", "high"))
    interval = "" if low is None or high is None else span(value, low, high)
    return MetricCell(number(value), interval, "", value, low, high)


def number(value: float | None) -> str:
    """Three decimals, but three significant digits; with an exponent if small or large (p-values are)."""
    return "–" if value is None else digits(value)(value)


def span(value: float | None, low: float | None, high: float | None) -> str:
    """The interval of a value, with its digits."""
    if low is None or high is None:
        return "–"
    form = digits(high if value is None else value)
    return f"{form(low)} {'to' if low < 0 else '–'} {form(high)}"


def with_interval(metric_value: Mapping[str, Any]) -> str:
    """A value, not None, and its interval in brackets with its digits, as the terminal shows it."""
    value, low, high = (metric_value.get(key) for key in ("value", "low", "high"))
    assert value is not None
    form = digits(value)
    return form(value) if low is None or high is None else f"{form(value)} [{form(low)}, {form(high)}]"


def digits(value: float) -> Callable[[float], str]:
    """How `number` writes a value, for the bounds of its interval too: as many decimals, or an exponent."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return _exponential
    decimals = max(3, 2 - math.floor(math.log10(abs(value)))) if value else 3
    return f"{{:.{decimals}f}}".format


def _exponential(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def quantity(value: float, unit: str = "") -> str:
    """1234567 -> 1.23 M: counts with a decimal prefix."""
    for step, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= step:
            return f"{value / step:.3g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def byte_size(value: float) -> str:
    """Bytes with a binary prefix."""
    for step, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= step:
            return f"{value / step:.{4 if value >= 1000 * step else 3}g} {prefix}"
    return f"{value:g} B"


def duration(seconds: float) -> str:
    """Seconds as 12.3 s, 4 min 05 s or 2 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
