"""Metrics of the attacks' tables. Pure functions, no model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ofmu_ray.attacks.curves import areas, row_curves
from ofmu_ray.attacks.prefix import worst_case
from ofmu_ray.evaluation.multiple_choice import choice_metrics
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import Clusters, MetricValue, mean_metric

MEASURES = ("cka_debiased", "cka", "cosine")
Values = dict[str, tuple[FloatArray, Clusters]]


def check_metrics(
    kind: str, table: pa.Table, reference: pa.Table | None = None, *, samples: int, seed: int
) -> dict[str, MetricValue]:
    """Metrics of one attack on one model, named `<group>/<what>`; the names and definitions: docs/metrics.md.

    `reference`: the retrained model's table of the same check, for what is measured against it. A mean over rows of
    which one is not finite is absent with that reason.
    """
    if kind == "choice":
        return choice_metrics(table, samples=samples, seed=seed, name=kind)
    if kind == "alignment":
        return _alignment(table)
    make: Callable[[pa.Table, pa.Table | None], Values] = {
        "relearn": _relearn, "quantise": _quantise, "prefix": _prefix,
    }[kind]  # fmt: skip
    results = {}
    for name, (values, clusters) in make(table, reference).items():
        broken = int((~np.isfinite(values)).sum())
        if broken:
            results[name] = MetricValue.absent(f"the loss is not finite on {broken} of {len(values)} rows")
        else:
            results[name] = mean_metric(values, samples=samples, seed=seed, name=f"{kind}/{name}", clusters=clusters)
    return results


def _labels(clusters: list[str | None]) -> Clusters:
    return None if None in clusters else np.array(clusters)


def _relearn(table: pa.Table, reference: pa.Table | None) -> Values:
    found: Values = {}
    for group in ("forget", "attacked", "retain"):
        curves = row_curves(table, group)
        labels = _labels(curves.clusters)
        for at, step in enumerate(curves.steps):
            found[f"{group}/step_{step:g}"] = curves.probability[:, at], labels
        found[f"{group}/height"] = areas(curves), labels
        if reference is not None:
            found[f"{group}/height_beyond_retrained"] = areas(curves, row_curves(reference, group)), labels
    return found


def _quantise(table: pa.Table, _: pa.Table | None) -> Values:
    found: Values = {}
    for name in ("forget", "retain"):
        for scheme in table["scheme"].unique().to_pylist():
            rows = table.filter(pc.and_(pc.equal(table["set"], name), pc.equal(table["scheme"], scheme)))
            found[f"{name}/{scheme}"] = rows["probability"].to_numpy(), _labels(rows["cluster"].to_pylist())
    return found


def _prefix(table: pa.Table, _: pa.Table | None) -> Values:
    worst = worst_case(table)
    attacks = table["attack"].unique().to_pylist()
    found: Values = {}
    for group, column in (("probability", "probability"), ("rouge", "rouge_l_recall")):
        if table[column].null_count:  # checks.prefix.generate: false
            continue
        for attack in attacks:
            rows = table.filter(pc.equal(table["attack"], attack))
            found[f"{group}/{attack}"] = rows[column].to_numpy(), _labels(rows["cluster"].to_pylist())
        found[f"{group}/worst_case"] = worst[column].to_numpy(), _labels(worst["cluster"].to_pylist())
    return found


def _alignment(table: pa.Table) -> dict[str, MetricValue]:
    """Each layer's metrics, and their means over layers (which have no interval of their own)."""
    means: dict[str, MetricValue] = {}
    layers: dict[str, MetricValue] = {}
    for measure in MEASURES:
        for name in table["set"].unique().to_pylist():
            rows = table.filter(pc.equal(table["set"], name)).to_pylist()
            values = [row[measure] for row in rows if row[measure] is not None]
            reasons = [f"layer {row['layer']}: {row[f'{measure}_reason']}" for row in rows if row[measure] is None]
            place = f"{measure}/{name}"
            if reasons:
                means[f"{place}/mean"] = MetricValue.absent(reasons[0])
            else:
                why = "no interval: a mean over layers; the layers have theirs where there is one"
                means[f"{place}/mean"] = MetricValue(float(np.mean(values)), reason=why)
            for row in rows:
                low, high, reason = (row[f"{measure}_{part}"] for part in ("low", "high", "reason"))
                layers[f"{place}/layer_{row['layer']}"] = MetricValue(row[measure], low, high, reason=reason)
    return means | layers
