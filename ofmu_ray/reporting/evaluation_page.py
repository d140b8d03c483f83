"""The page of `ofmu evaluate`: any number of models side by side in one self-contained HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ofmu_ray.metrics.registry import GROUPS, metric
from ofmu_ray.reporting import formats, image_section
from ofmu_ray.reporting.attack_tables import Group, Row, check_table, model_row
from ofmu_ray.reporting.page import page_environment, yaml_text
from ofmu_ray.storage import PathLike, atomic_write

RETRAINED = "retrained"
_NOTES = {
    "Forgetting": "Scores on the forget rows should match a model retrained without them, not fall below it.",
    "Membership inference": "Forget rows (members) against holdout rows. The two sets may differ anyway, so the "
    "retrained model's AUC need not be 0.5: compare with the retrained model.",
    "Generations": "A damaged model answers nothing or repeats itself; that is not forgetting.",
    "Probes": "The same facts, asked in other ways.",
}


@dataclass(frozen=True, kw_only=True)
class ComparisonData:
    """Everything the page shows, as plain values."""

    title: str
    metrics: Mapping[str, Mapping[str, Any]]
    """Model -> metrics as in metrics.json, including the retrained model, which comes last."""
    models: Mapping[str, str]
    """Model -> its folder or hub name."""
    checks: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Attack -> model -> metrics as in metrics.json."""
    verdicts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Model -> sentences on its forgetting and its answers."""
    tables: Mapping[str, Any] = field(default_factory=dict)
    """Model -> per-row values, a pyarrow table; None values are skipped."""
    images: image_section.Images | None = None
    """Of image classifiers: classes and pictures."""
    samples: int = 5
    """Images shown per set."""
    reveal_text: bool = False
    """Whether forget images are shown (personal data)."""
    tokenizers: int = 1
    """Number of different tokenizers among the models."""
    config: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    open_command: str | None = None
    """How to open the run in MLflow."""


def write_comparison(path: PathLike, data: ComparisonData) -> None:
    """Write the page atomically."""
    atomic_write(path, render_comparison(data))


def render_comparison(data: ComparisonData) -> str:
    """The page as HTML."""
    groups, absent = grouped(data.metrics)
    template = page_environment().get_template("comparison.html.j2")
    return str(
        template.render(
            data=data,
            models=list(data.metrics),
            groups=groups,
            absent=absent,
            checks=[check_table(name, values, list(data.metrics)) for name, values in data.checks.items()],
            **image_section.images_context(data.tables, data.images, data.samples),
            command=shlex.join(data.command),
            config_yaml=yaml_text(data.config),
        )
    )


def grouped(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[list[Group], list[tuple[str, list[str]]]]:
    """Metrics that some model has, by group; and (reason, labels) of those that no model has."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows: dict[str, list[Row]] = {}
    absent: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (GROUPS.index(metric(name).group), names.index(name))):
        declared, of_models = metric(name), {model: values.get(name) for model, values in metrics.items()}
        label = declared.label
        if declared.group == "Membership inference":  # the heading says it
            label = label.removeprefix("Membership ")
            label = label[0].upper() + label[1:]
        row = model_row(label, formats.direction(name), of_models)
        if any(cell.value is not None for cell in row.cells.values()):
            rows.setdefault(declared.group, []).append(row)
        else:
            reason = next((cell.reason for cell in row.cells.values() if cell.reason), "not measured")
            absent.setdefault(reason, []).append(row.label)
    groups = [Group(title, values, note=_NOTES.get(title, "")) for title, values in rows.items()]
    return groups, list(absent.items())
