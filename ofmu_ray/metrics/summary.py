"""From per-row values to the metrics of `metrics.json`: the single path of all reported numbers."""

from __future__ import annotations

import pyarrow as pa

from ofmu_ray.metrics.intervals import MetricValue
from ofmu_ray.metrics.registry import Inputs, compute


def summarise(
    table: pa.Table, retrained: pa.Table | None = None, *, bootstrap_samples: int = 1000, seed: int = 0
) -> dict[str, MetricValue]:
    """All metrics of one model from its per-row values, as `evaluate_model` returns them.

    `retrained`: per-row values of the model trained without the forget rows; without it, metrics that need it are
    absent. A metric whose inputs are missing or not finite is absent with the reason. All metrics: `registry.metrics`;
    those of memorisation, generations, membership (set `holdout`) and probes (sets `<probe>_forget` and
    `<probe>_retain`) are listed only if their set has rows.
    """
    return compute(Inputs(table, retrained, bootstrap_samples, seed))
