"""OpenUnlearning's aggregate: the harmonic mean of memorisation, privacy and utility, by which its ranking is made.

Dorna et al. 2025, arXiv 2506.12618, appendix F.1. Pure functions of figures and per-row values that are there anyway;
what differs from the paper stands in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics.columns import finite, rows_of
from ofmu_ray.metrics.intervals import MetricValue
from ofmu_ray.metrics.registry import NEEDS_RETRAINED, Metric, register
from ofmu_ray.metrics.summary import summarise

AGGREGATE = ("aggregate", "memorisation_score", "privacy_score", "utility_score")
"""Names that `aggregate_figures` gives; all in [0, 1], higher is better."""

for _name, _label in zip(
    AGGREGATE, ("Aggregate (OpenUnlearning)", "Memorisation score", "Privacy score", "Utility score"), strict=True
):
    register(Metric(name=_name, label=_label, better="high", group="Utility"))

_ATTACKS = ("mia_loss_auc", "mia_zlib_auc", "mia_min_k_auc", "mia_min_k_plus_auc")
_MEMORISED = ("forget_extraction_strength", "forget_exact_memorisation", "paraphrase_probability", "truth_ratio")
_NO_INTERVAL = "made of other figures: no interval"


def aggregate_inputs(table: pa.Table | None) -> dict[str, MetricValue]:
    """The figures that `aggregate_figures` wants of a model, without intervals: our own, and on forget rows what the
    paper measures besides, P(paraphrase) and P(right) / (P(right) + P(wrong))."""
    if table is None:
        return {}
    rows, found = rows_of(table, "forget"), summarise(table, bootstrap_samples=1)
    for name, column in (("paraphrase_probability", "paraphrase_nll"), ("truth_ratio", "truth_ratio")):
        values = finite(rows, "forget", column) if rows.num_rows else "no forget rows were evaluated"
        if isinstance(values, str):
            found[name] = MetricValue.absent(values)
            continue
        values = values[~np.isnan(values)]
        found[name] = MetricValue(
            float(np.mean(np.exp(-values) if column == "paraphrase_nll" else 1.0 / (1.0 + values)))
        )
    return found


def aggregate_figures(
    model: Mapping[str, MetricValue], target: Mapping[str, MetricValue], retrained: Mapping[str, MetricValue]
) -> dict[str, MetricValue]:
    """AGGREGATE of a model from the `aggregate_inputs` of the three on the same rows; absent with the reason."""
    memorised = _harmonic([_inverse(_figure(model, name)) for name in _MEMORISED])
    privacy = _privacy(model, retrained) if retrained else MetricValue.absent(NEEDS_RETRAINED)
    parts = (memorised, privacy, _utility(model, target))
    return dict(zip(AGGREGATE, (_harmonic(parts), *parts), strict=True))


def privacy_score(auc: float, retrained: float) -> float:
    """How near an attack's AUC is to the retrained model's: 1 where equal, falling linearly to 0 at 0 and at 1."""
    above = (1.0 - auc) / (1.0 - retrained) if retrained < 1.0 else np.inf
    below = auc / retrained if retrained > 0.0 else np.inf
    return float(min(above, below, 1.0))


def _privacy(model: Mapping[str, MetricValue], retrained: Mapping[str, MetricValue]) -> MetricValue:
    scores = []
    for name in _ATTACKS:
        own, other = _figure(model, name), _figure(retrained, name)
        if own.value is None or other.value is None:
            return own if own.value is None else other
        scores.append(MetricValue(privacy_score(own.value, other.value)))
    return _harmonic(scores)


def _utility(model: Mapping[str, MetricValue], target: Mapping[str, MetricValue]) -> MetricValue:
    own, other = _figure(model, "model_utility"), _figure(target, "model_utility")
    if own.value is None or other.value is None:
        return own if own.value is None else other
    if other.value == 0.0:
        return MetricValue.absent("the target's model utility is 0")
    return MetricValue(min(1.0, own.value / other.value), reason=_NO_INTERVAL)


def _figure(figures: Mapping[str, MetricValue], name: str) -> MetricValue:
    rows = "holdout" if name in _ATTACKS else "forget"
    return figures.get(name) or MetricValue.absent(f"no {rows} rows were evaluated (evaluation.sets.{rows})")


def _inverse(figure: MetricValue) -> MetricValue:
    return figure if figure.value is None else MetricValue(1.0 - figure.value)


def _harmonic(figures: Sequence[MetricValue]) -> MetricValue:
    """Harmonic mean; 0 if one is 0, absent if one is."""
    absent = next((figure for figure in figures if figure.value is None), None)
    if absent is not None:
        return absent
    value = metrics.model_utility([figure.value or 0.0 for figure in figures])
    return MetricValue(float(value), reason=_NO_INTERVAL)
