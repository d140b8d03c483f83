"""The page of a run: one self-contained HTML file for screen, phone and paper."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofmu_ray.evaluation.rows import is_private
from ofmu_ray.metrics.registry import metrics
from ofmu_ray.reporting import formats, image_section, plots, samples
from ofmu_ray.storage import PathLike, atomic_write


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a page shows, as plain values; what is empty or None is not shown."""

    title: str
    """The run's name."""
    config: Mapping[str, Any]
    """The complete configuration, nested."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """``before``, ``after``, ``retrained`` as in metrics.json."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """``run`` as in metrics.json; the page shows its ``status``, ``message`` and ``rounds``."""
    cost: Mapping[str, Any] = field(default_factory=dict)
    """``cost`` as in metrics.json."""
    series: Sequence[Mapping[str, float]] = ()
    """One mapping per round, with ``round``."""
    tables: Mapping[str, Any] = field(default_factory=dict)
    """Model (before, after, retrained) -> per-row values, a pyarrow table; None values are skipped."""
    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Row id -> (question, answer); forget rows' texts are shown only with `reveal_text`."""
    images: image_section.Images | None = None
    """Of image classifiers: classes and pictures."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The data report: ``streams``, ``overlap``, ``tokenizer_sha256``."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """See build_manifest."""
    command: str | Sequence[str] = ()
    """How to run it again."""
    open_command: str | None = None
    """How to open the run in MLflow."""
    samples: int = 5
    """Generations shown per set."""
    reveal_text: bool = False
    """Show the text of forget rows (personal data)."""


def write_report(path: PathLike, data: ReportData) -> None:
    """Write the page atomically. It shows forget rows by id only, unless `reveal_text`."""
    atomic_write(path, render(data))


def render(data: ReportData) -> str:
    """The page as HTML."""
    return str(page_environment().get_template("report.html.j2").render(_context(data)))


def page_environment() -> Any:
    """jinja2 with this folder's templates and the number formats as filters; everything is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ofmu_ray", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formats.number,
        "quantity": formats.quantity,
        "bytes": formats.byte_size,
        "duration": formats.duration,
        "label": formats.label,
    }
    return environment


def _context(data: ReportData) -> dict[str, Any]:
    tables = {model: table for model, table in data.tables.items() if table is not None}
    ratios = {model: _forget_ratios(table) for model, table in tables.items()}
    ratios = {model: values for model, values in ratios.items() if len(values)}
    tests = _tests(ratios)
    rows = formats.metric_table(data.metrics)
    return {
        "data": data,
        "header": _header(data),
        "headline": _headline(data.metrics),
        "metric_rows": [row for row in rows if row.measured],
        "missing": formats.missing(rows),
        "models": [model for model in formats.MODELS if data.metrics.get(model)],
        "truth_ratios": plots.truth_ratio_panel(ratios, tests.get("after")) if ratios else None,
        "tests": tests,
        "panels": plots.series_panels(data.series),
        "samples": {}
        if data.images
        else samples.sample_rows(tables, data.texts, data.samples, reveal=data.reveal_text),
        **image_section.images_context(tables, data.images, data.samples),
        "is_private": is_private,
        "degeneration": samples.degeneration(tables),
        "phases": _phases(data.cost),
        "streams": dict(data.data.get("streams") or {}),
        "config_yaml": yaml_text(data.config),
        "command": data.command if isinstance(data.command, str) else shlex.join(data.command),
        "hashes": _hashes(data),
    }


def _header(data: ReportData) -> list[tuple[str, str]]:
    """(label, value) under the title."""
    config, manifest = data.config, data.manifest
    model = config.get("model") or {}
    training = config.get("training") or {}
    method = str(config.get("method") or "finetune")
    preset = (config.get(method) or {}).get("preset")
    workers = training.get("workers")
    engine = " ".join(
        str(part)
        for part in (
            formats.engine_name(training),
            f"× {workers} workers" if workers and workers > 1 else None,
        )
        if part is not None
    )
    code = manifest.get("code") or {}
    version = " ".join(
        part
        for part in (
            str(code.get("version") or ""),
            f"({code['commit'][:10]}{', modified' if code.get('modified') else ''})" if code.get("commit") else "",
        )
        if part
    )
    pairs = {
        "method": f"{method} ({preset})" if preset else method,
        "model": model.get("path"),
        "precision": model.get("precision"),
        "engine": engine,
        "seed": config.get("seed"),
        "date (UTC)": str(manifest.get("created") or "")[:16].replace("T", " "),
        "code": version,
        "rounds": data.run.get("rounds"),
    }
    return [(name, str(value)) for name, value in pairs.items() if value not in (None, "")]


def _headline(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics that lead, before and after."""
    rows = []
    for one in (one for one in metrics() if one.lead):
        cells = {model: formats.cell((measured.get(model) or {}).get(one.name)) for model in formats.MODELS}
        if any(cell.value is not None for cell in cells.values()):
            rows.append({"metric": one, "cells": cells})
    return rows


def _forget_ratios(table: Any) -> NDArray[np.float64]:
    """Finite truth ratios of the forget rows, in the table's order."""
    if not {"set", "truth_ratio"} <= set(table.column_names):
        return np.empty(0)
    pairs = zip(table["set"].to_pylist(), table["truth_ratio"].to_pylist(), strict=True)
    values = np.array([ratio for name, ratio in pairs if name == "forget" and ratio is not None], dtype=np.float64)
    return values[np.isfinite(values)]


def _tests(ratios: Mapping[str, NDArray[np.float64]]) -> dict[str, plots.KolmogorovSmirnov]:
    if "retrained" not in ratios:
        return {}
    return {
        model: plots.kolmogorov_smirnov(values, ratios["retrained"])
        for model, values in ratios.items()
        if model != "retrained"
    }


def _phases(cost: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of the longest in percent)."""
    seconds = cost.get("seconds") or {}
    longest = max(seconds.values(), default=0.0) or 1.0
    words = {"rounds": "training, rounds only"}
    return [(words.get(name, name), value, 100 * value / longest) for name, value in seconds.items()]


def yaml_text(config: Mapping[str, Any]) -> str:
    """A configuration as YAML."""
    import yaml

    return str(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100))


def _hashes(data: ReportData) -> list[tuple[str, str]]:
    """(what, digest) of the manifest and the data report."""
    manifest = data.manifest
    digests: list[tuple[str, Any]] = [
        ("configuration", manifest.get("config_hash")),
        ("tokenizer", data.data.get("tokenizer_sha256")),
    ]
    for name, stream in (data.data.get("streams") or {}).items():
        digests.append((f"{name} rows", stream.get("sha256")))
    for role, files in (manifest.get("models") or {}).items():
        digests += [(f"{role}: {file}", digest) for file, digest in (files or {}).items()]
    return [(what, str(digest)) for what, digest in digests if digest]
