"""Hard in-scope probes: is the forgotten content also gone in other words, in another language, in combination?

A probe is a pair of evaluation sets, `<probe>_forget` and `<probe>_retain`: questions about the forget rows' facts, and
of the same kind about content to keep. Both the unlearned and the retrained model answer them.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics.columns import clusters_of, finite, right_answer_ratios, rows_of, same_rows
from ofmu_ray.metrics.intervals import (
    MetricValue,
    ResampledValue,
    forget_quality_estimates,
    utility_estimate,
    variance_metric,
)
from ofmu_ray.metrics.registry import NEEDS_RETRAINED, Inputs, Metric, register

VARIANCES = ("probes_forget_quality_variance", "probes_utility_variance")


def probe_names(table: pa.Table) -> list[str]:
    """The probes with a `<probe>_forget` or `<probe>_retain` set in the table, in its order."""
    sets = dict.fromkeys(table["set"].to_pylist())
    halves = [(name, name.rpartition("_")) for name in sets]
    return list(dict.fromkeys(probe for _, (probe, _, half) in halves if probe and half in ("forget", "retain")))


def probe_metrics(inputs: Inputs) -> dict[str, MetricValue]:
    """Per probe `<probe>_forget_quality`, `<probe>_ks_statistic` and `<probe>_utility`; then their VARIANCES.

    Forget quality: as the main metric, on the probe's forget rows; truth ratios use the answer itself if a row has no
    paraphrase. Utility: harmonic mean of probability, ROUGE-L recall and truth ratio of the probe's retain rows.
    Variances are over the probes with a value. Empty without probes.
    """
    table, retrained, samples, seed = inputs.table, inputs.retrained, inputs.samples, inputs.seed
    result: dict[str, MetricValue] = {}
    qualities: list[ResampledValue] = []
    utilities: list[ResampledValue] = []
    names = probe_names(table)
    for probe in names:
        quality = NEEDS_RETRAINED if retrained is None else _quality(table, retrained, probe, samples, seed)
        if isinstance(quality, str):
            result[f"{probe}_forget_quality"] = result[f"{probe}_ks_statistic"] = MetricValue.absent(quality)
        else:
            result[f"{probe}_forget_quality"], result[f"{probe}_ks_statistic"] = (
                each.metric_value() for each in quality
            )
            qualities.append(quality[0])
        utility = _utility(table, probe, samples, seed)
        result[f"{probe}_utility"] = MetricValue.absent(utility) if isinstance(utility, str) else utility.metric_value()
        utilities += [] if isinstance(utility, str) else [utility]
    if names:
        lacking = retrained is None
        result[VARIANCES[0]] = MetricValue.absent(NEEDS_RETRAINED) if lacking else variance_metric(qualities)
        result[VARIANCES[1]] = variance_metric(utilities)
    return result


def _quality(table: pa.Table, retrained: pa.Table, probe: str, samples: int, seed: int) -> list[ResampledValue] | str:
    name = f"{probe}_forget"
    rows = [rows_of(source, name) for source in (table, retrained)]
    if not all(those.num_rows for those in rows):
        return f"no {name} rows were evaluated of both models"
    if not same_rows(*rows):
        return f"the retrained model was evaluated on other {name} rows"
    own, other = (right_answer_ratios(those, name) for those in rows)
    if isinstance(own, str):
        return own
    if isinstance(other, str):
        return f"retrained model: {other}"
    both = ~np.isnan(own) & ~np.isnan(other)
    labels = clusters_of(rows[0])
    clusters = None if labels is None else labels[both]
    quality = f"{probe}_forget_quality"
    return forget_quality_estimates(own[both], other[both], samples=samples, seed=seed, name=quality, clusters=clusters)


def _utility(table: pa.Table, probe: str, samples: int, seed: int) -> ResampledValue | str:
    name = f"{probe}_retain"
    rows = rows_of(table, name)
    if rows.num_rows == 0:
        return f"no {name} rows were evaluated"
    ratios = right_answer_ratios(rows, name)
    columns = [
        finite(rows, name, "probability"),
        finite(rows, name, "rouge_l_recall"),
        ratios if isinstance(ratios, str) else metrics.true_better(ratios),
    ]
    values = [column for column in columns if not isinstance(column, str)]
    if len(values) < len(columns):
        return next(column for column in columns if isinstance(column, str))
    return utility_estimate(
        {name: values}, samples=samples, seed=seed, name=f"{probe}_utility", clusters={name: clusters_of(rows)}
    )


_RETRAINED = frozenset({"retrained"})
register(
    Metric(
        name="*_forget_quality", label="{} forget quality", better="high", group="Probes", compute=probe_metrics,
        needs=_RETRAINED, p_value=True,
    ),
    Metric(
        name="*_ks_statistic", label="{} KS distance to retrained", better="low", group="Probes", compute=probe_metrics,
        needs=_RETRAINED,
    ),
    Metric(name="*_utility", label="{} utility", better="high", group="Probes", compute=probe_metrics),
    Metric(
        name="probes_*_variance", label="Variance of {} over probes", better="low", group="Probes",
        compute=probe_metrics,
    ),
)  # fmt: skip
