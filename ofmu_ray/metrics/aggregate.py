"""OpenUnlearning's aggregate, the basis of its ranking: the harmonic mean of memorisation, privacy and utility.

Dorna et al. 2025, arXiv 2506.12618, appendix F.1. Pure functions of existing metrics and per-row values. Differences
from the paper: docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics import functions
from ofmu_ray.metrics.columns import finite, rows_of
from ofmu_ray.metrics.intervals import MetricValue
from ofmu_ray.metrics.registry import NEEDS_RETRAINED, Inputs, Metric, register
from ofmu_ray.metrics.summary import summarise

AGGREGATE = ("aggregate", "memorisation_score", "privacy_score", "utility_score")
"""Metrics of `aggregate_metrics`; all in [0, 1], higher is better."""

for _name, _label in zip(
    AGGREGATE, ("Aggregate (OpenUnlearning)", "Memorisation score", "Privacy score", "Utility score"), strict=True
):
    register(Metric(name=_name, label=_label, better="high", group="Utility", first=_name == "aggregate"))

_ATTACKS = ("mia_loss_auc", "mia_zlib_auc", "mia_min_k_auc", "mia_min_k_plus_auc")
_MEMORISED = ("forget_extraction_strength", "forget_exact_memorisation", "paraphrase_probability", "truth_ratio")
_NO_INTERVAL = "derived from other metrics: no interval"


def aggregate_inputs(table: pa.Table | None) -> dict[str, MetricValue]:
    """A model's metrics for `aggregate_metrics`, without intervals: ours, plus two from the paper on forget rows,
    P(paraphrase) and P(right) / (P(right) + P(wrong))."""
    if table is None or Inputs(table, None).kind == "images":  # images: MIA efficacy alone takes seconds of each run
        return {}
    rows, inputs = rows_of(table, "forget"), summarise(table, bootstrap_samples=1)
    for name, column in (("paraphrase_probability", "paraphrase_nll"), ("truth_ratio", "truth_ratio")):
        values = finite(rows, "forget", column) if rows.num_rows else "no forget rows were evaluated"
        if isinstance(values, str):
            inputs[name] = MetricValue.absent(values)
            continue
        values = values[~np.isnan(values)]
        inputs[name] = MetricValue(
            float(np.mean(np.exp(-values) if column == "paraphrase_nll" else 1.0 / (1.0 + values)))
        )
    return inputs


def aggregate_metrics(
    model: Mapping[str, MetricValue], target: Mapping[str, MetricValue], retrained: Mapping[str, MetricValue]
) -> dict[str, MetricValue]:
    """AGGREGATE of a model from the `aggregate_inputs` of all three models on the same rows; absent with the reason."""
    memorised = _harmonic([_inverse(_value(model, name)) for name in _MEMORISED])
    privacy = _privacy(model, retrained) if retrained else MetricValue.absent(NEEDS_RETRAINED)
    parts = (memorised, privacy, _utility(model, target))
    return dict(zip(AGGREGATE, (_harmonic(parts), *parts), strict=True))


def privacy_score(auc: float, retrained: float) -> float:
    """How close an attack's AUC is to the retrained model's: 1 if equal, falling linearly to 0 at 0 and at 1."""
    above = (1.0 - auc) / (1.0 - retrained) if retrained < 1.0 else np.inf
    below = auc / retrained if retrained > 0.0 else np.inf
    return float(min(above, below, 1.0))


def _privacy(model: Mapping[str, MetricValue], retrained: Mapping[str, MetricValue]) -> MetricValue:
    scores = []
    for name in _ATTACKS:
        own, other = _value(model, name), _value(retrained, name)
        if own.value is None or other.value is None:
            return own if own.value is None else other
        scores.append(MetricValue(privacy_score(own.value, other.value)))
    return _harmonic(scores)


def _utility(model: Mapping[str, MetricValue], target: Mapping[str, MetricValue]) -> MetricValue:
    own, other = _value(model, "model_utility"), _value(target, "model_utility")
    if own.value is None or other.value is None:
        return own if own.value is None else other
    if other.value == 0.0:
        return MetricValue.absent("the target's model utility is 0")
    return MetricValue(min(1.0, own.value / other.value), reason=_NO_INTERVAL)


def _value(metrics: Mapping[str, MetricValue], name: str) -> MetricValue:
    rows = "holdout" if name in _ATTACKS else "forget"
    return metrics.get(name) or MetricValue.absent(f"no {rows} rows were evaluated (evaluation.sets.{rows})")


def _inverse(metric: MetricValue) -> MetricValue:
    return metric if metric.value is None else MetricValue(1.0 - metric.value)


def _harmonic(values: Sequence[MetricValue]) -> MetricValue:
    """Harmonic mean; 0 if one is 0, absent if one is."""
    absent = next((value for value in values if value.value is None), None)
    if absent is not None:
        return absent
    mean = functions.model_utility([value.value or 0.0 for value in values])
    return MetricValue(float(mean), reason=_NO_INTERVAL)
