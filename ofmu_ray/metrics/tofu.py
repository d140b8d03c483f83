"""TOFU's metrics: probability, ROUGE and truth ratio of each set, forget quality and model utility."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics import functions
from ofmu_ray.metrics.columns import clusters_of, finite, rows_of, same_rows
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import MetricValue, forget_quality_metrics, mean_metric, utility_estimate
from ofmu_ray.metrics.registry import Inputs, Metric, metric, register

SETS = {"forget": "Forget", "retain": "Retain", "real_authors": "Real authors", "world_facts": "World facts"}
"""Set -> label."""
UTILITY_SETS = tuple(SETS)[1:]
SCORES = {"probability": "probability", "rouge": "ROUGE-L recall", "truth_ratio": "truth ratio"}
"""Score of every set -> label."""


def probability(rows: pa.Table, name: str) -> FloatArray | str:
    return finite(rows, name, "probability")


def rouge(rows: pa.Table, name: str) -> FloatArray | str:
    return finite(rows, name, "rouge_l_recall")


def truth_ratio(rows: pa.Table, name: str) -> FloatArray | str:
    """As a score: closeness to 1 on forget rows; elsewhere, how much likelier right answers are than wrong ones."""
    ratios = finite(rows, name, "truth_ratio")
    if isinstance(ratios, str):
        return ratios
    return functions.closer_to_1(ratios) if name == "forget" else functions.true_better(ratios)


def quality(inputs: Inputs) -> Mapping[str, MetricValue]:
    """forget_quality and ks_statistic, of the forget rows' truth ratios against the retrained model's."""
    result = _quality(inputs)
    both = (MetricValue.absent(result), MetricValue.absent(result)) if isinstance(result, str) else result
    return dict(zip(("forget_quality", "ks_statistic"), both, strict=True))


def _quality(inputs: Inputs) -> tuple[MetricValue, MetricValue] | str:
    if inputs.retrained is None:
        return "needs the truth ratios of a model trained without the forget rows (evaluation.retrained)"
    ratios: list[FloatArray] = []
    rows = [inputs.rows("forget"), rows_of(inputs.retrained, "forget")]
    for whose, those in zip(("", "retrained model: "), rows, strict=True):
        values = finite(those, "forget", "truth_ratio") if those.num_rows else "no forget rows were evaluated"
        if isinstance(values, str):
            return whose + values
        ratios.append(values)
    if not same_rows(*rows):
        return "the retrained model was evaluated on other forget rows"
    both = ~np.isnan(ratios[0]) & ~np.isnan(ratios[1])
    labels = clusters_of(rows[0])
    clusters = None if labels is None else labels[both]
    return forget_quality_metrics(
        ratios[0][both], ratios[1][both], name="forget_quality", clusters=clusters, **inputs.options
    )


def utility(inputs: Inputs) -> Mapping[str, MetricValue]:
    """model_utility: harmonic mean of nine scores on content to keep."""
    columns = {part: [inputs.values(metric(f"{part}_{score}")) for score in SCORES] for part in UTILITY_SETS}
    reasons = [column for scores in columns.values() for column in scores if isinstance(column, str)]
    if reasons:
        reason = f"model utility needs all nine components: {'; '.join(dict.fromkeys(reasons))}"
        return {"model_utility": MetricValue.absent(reason)}
    sets = {part: [column for column in scores if not isinstance(column, str)] for part, scores in columns.items()}
    clusters = {part: clusters_of(inputs.rows(part)) for part in UTILITY_SETS}
    return {
        "model_utility": utility_estimate(
            sets, name="model_utility", clusters=clusters, **inputs.options
        ).metric_value()
    }


register(
    Metric(
        name="forget_quality", label="Forget quality", better="high", group="Forgetting", compute=quality,
        needs=frozenset({"retrained"}), paired="distance", tested_as="ks_statistic", p_value=True, headline=True,
        lead="p-value of the KS test against the retrained model", first=True,
    ),
    Metric(
        name="ks_statistic", label="KS distance to retrained", better="low", group="Forgetting", compute=quality,
        needs=frozenset({"retrained"}), paired="distance", first=True, span=1.0,
    ),
    Metric(
        name="model_utility", label="Model utility", better="high", group="Utility", compute=utility,
        needs=frozenset({"generations", "real_authors", "world_facts"}), paired="utility", headline=True,
        lead="harmonic mean of nine scores on what should be kept", first=True,
    ),
)  # fmt: skip
for _set, _words in SETS.items():
    for _score, _values in (("probability", probability), ("rouge", rouge), ("truth_ratio", truth_ratio)):
        _needs = {_set} & {"real_authors", "world_facts"} | ({"generations"} if _score == "rouge" else set())
        register(
            Metric(
                name=f"{_set}_{_score}",
                label=f"{_words} {SCORES[_score]}",
                better="retrained" if _set == "forget" else "high",
                alone="low" if (_set, _score) in (("forget", "probability"), ("forget", "rouge")) else None,
                group="Forgetting" if _set == "forget" else "Utility",
                set=_set,
                values=_values,
                always=True,
                needs=frozenset(_needs),
                paired="mean",
                span=1.0,
                first=(_set, _score) == ("forget", "truth_ratio"),
                headline=_set == "forget" or (_set == "retain" and _score != "truth_ratio"),
            )
        )


LEVEL = 0.05
"""Significance of the verdict in words; TOFU's."""


def forgetting_words(quality: Mapping[str, Any] | None) -> str | None:
    """Forget quality, {"value"} or {"value": null, "reason"}, as a verdict; None: it was not asked for."""
    if not quality:
        return None
    p = quality.get("value")
    if p is None:
        return f"no verdict on forgetting: {quality.get('reason') or 'not measured'}"
    shown = f"{p:.2f}" if p >= 0.01 else f"{p:.1e}"
    if p > LEVEL:
        return f"p = {shown}: not distinguishable from the retrained model (p > {LEVEL})"
    return f"p = {shown}: distinguishable from the retrained model (p <= {LEVEL})"


def level_words(table: pa.Table | None, level: float | None, *, samples: int, seed: int) -> str | None:
    """Whether forget answers are as unlikely as `level` (nats per token) says; None: no level, or no forget answers.

    The mean over rows of each answer's loss per token, with its bootstrap interval.
    """
    if table is None or level is None:
        return None
    rows = rows_of(table, "forget")
    losses = finite(rows, "forget", "answer_nll") if rows.num_rows else "no rows"
    if isinstance(losses, str) or np.isnan(losses).any():
        return None
    loss = mean_metric(losses, samples=samples, seed=seed, name="forget_level", clusters=clusters_of(rows))
    if loss.value is None or loss.low is None or loss.high is None:
        return None
    place = "short of" if loss.high < level else "beyond" if loss.low > level else "at"
    shown = f"{loss.value:.2f} [{loss.low:.2f}, {loss.high:.2f}]"
    return f"forget answers: {shown} nats per token, {place} the level of {level:.2f}"
