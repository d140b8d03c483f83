"""Figures of the checks' tables. Pure functions, no model."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ofmu_ray.evaluation.choice import choice_figures
from ofmu_ray.evaluation.intervals import Clusters, Figure, mean_figure
from ofmu_ray.evaluation.metrics import FloatArray
from ofmu_ray.evaluation.robustness.curves import areas, row_curves
from ofmu_ray.evaluation.robustness.prefix import worst_case


def check_figures(
    kind: str, table: pa.Table, reference: pa.Table | None = None, *, samples: int, seed: int
) -> dict[str, Figure]:
    """Name -> figure of one check of one model.

    `reference`: the retrained model's table of the same check, for what is measured against it.
    """
    if kind == "choice":
        return choice_figures(table, samples=samples, seed=seed, name=kind)
    if kind == "alignment":
        return _alignment(table)
    make = {"relearn": _relearn, "quantise": _quantise, "prefix": _prefix}[kind]
    return {
        name: mean_figure(values, samples=samples, seed=seed, name=f"{kind}/{name}", clusters=clusters)
        for name, (values, clusters) in make(table, reference).items()
    }


Values = dict[str, tuple[FloatArray, Clusters]]


def _labels(clusters: list[str | None]) -> Clusters:
    return None if None in clusters else np.array(clusters)


def _relearn(table: pa.Table, reference: pa.Table | None) -> Values:
    found: Values = {}
    for group in ("attacked", "forget", "retain"):
        curves = row_curves(table, group)
        labels = _labels(curves.clusters)
        for at, step in enumerate(curves.steps):
            found[f"{group} rows, step {step:g}"] = curves.probability[:, at], labels
        found[f"{group} rows, mean height"] = areas(curves), labels
        if reference is not None:
            beyond = areas(curves, row_curves(reference, group))
            found[f"{group} rows, mean height beyond the retrained model's"] = beyond, labels
    return found


def _quantise(table: pa.Table, _: pa.Table | None) -> Values:
    found: Values = {}
    for name in ("forget", "retain"):
        for scheme in table["scheme"].unique().to_pylist():
            rows = table.filter(pc.and_(pc.equal(table["set"], name), pc.equal(table["scheme"], scheme)))
            found[f"{name} rows, {scheme}"] = rows["probability"].to_numpy(), _labels(rows["cluster"].to_pylist())
    return found


def _prefix(table: pa.Table, _: pa.Table | None) -> Values:
    found: Values = {}
    worst = worst_case(table)
    for attack in table["attack"].unique().to_pylist():
        rows = table.filter(pc.equal(table["attack"], attack))
        found[f"probability, {attack}"] = rows["probability"].to_numpy(), _labels(rows["cluster"].to_pylist())
    found["probability, worst case"] = worst["probability"].to_numpy(), _labels(worst["cluster"].to_pylist())
    if not worst["rouge_l_recall"].null_count:
        found["ROUGE-L, worst case"] = worst["rouge_l_recall"].to_numpy(), _labels(worst["cluster"].to_pylist())
    return found


def _alignment(table: pa.Table) -> dict[str, Figure]:
    """Each layer's figures, and their means over layers (which have no interval of their own)."""
    found: dict[str, Figure] = {}
    for measure in ("cka", "cka_debiased", "cosine"):
        for name in table["set"].unique().to_pylist():
            rows = table.filter(pc.equal(table["set"], name)).to_pylist()
            values = [row[measure] for row in rows]
            if None in values:
                reason = next(row[f"{measure}_reason"] for row in rows if row[measure] is None)
                found[f"{name} {measure}, mean"] = Figure.absent(reason)
            else:
                found[f"{name} {measure}, mean"] = Figure(float(np.mean(values)), n=len(values))
            for row in rows:
                layer = f"{name} {measure}/layer_{row['layer']}"
                found[layer] = Figure(
                    row[measure], row[f"{measure}_low"], row[f"{measure}_high"], reason=row[f"{measure}_reason"]
                )
    return found
