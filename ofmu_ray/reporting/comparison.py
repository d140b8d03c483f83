"""The page of `ofmu evaluate`: any number of models side by side, one HTML file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ofmu_ray.reporting import figures
from ofmu_ray.reporting.page import page_environment, yaml_text
from ofmu_ray.storage import PathLike, atomic_write


@dataclass(frozen=True, kw_only=True)
class Section:
    """A further table of the page."""

    title: str
    note: str
    """What the figures mean and which way is better."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class ComparisonData:
    """All that the page shows, as plain values."""

    title: str
    metrics: Mapping[str, Mapping[str, Any]]
    """Model -> figures as in metrics.json; the retrained model among them, last."""
    models: Mapping[str, str]
    """Model -> its folder or hub name."""
    sections: Sequence[Section] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    open_command: str | None = None
    """How to open the run in MLflow."""


def write_comparison(path: PathLike, data: ComparisonData) -> None:
    """Write the page; it appears whole or not at all."""
    atomic_write(path, render_comparison(data))


def render_comparison(data: ComparisonData) -> str:
    """The page as HTML."""
    names = list(dict.fromkeys(name for found in data.metrics.values() for name in found))
    rows = [
        {
            "label": figures.label(name),
            "direction": figures.direction(name),
            "cells": {model: figures.cell(found.get(name)) for model, found in data.metrics.items()},
        }
        for name in names
    ]
    reasons = [cell.reason for row in rows for cell in row["cells"].values() if cell.reason]  # type: ignore[attr-defined]
    template = page_environment().get_template("comparison.html.j2")
    return str(
        template.render(
            data=data,
            rows=rows,
            reasons=list(dict.fromkeys(reasons)),
            command=shlex.join(data.command),
            config_yaml=yaml_text(data.config),
        )
    )
