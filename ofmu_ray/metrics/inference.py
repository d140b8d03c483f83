"""Membership inference attacks as metrics, and PrivLeak; scores and rates: membership.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics import membership
from ofmu_ray.metrics.columns import clusters_of, finite, of_tokens, rows_of, same_rows
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import Clusters, MetricValue, attack_metrics, privleak_metric
from ofmu_ray.metrics.registry import NEEDS_RETRAINED, Inputs, Metric, register

ATTACKS = {
    "loss": "loss",
    "zlib": "ZLib",
    "min_k": "Min-K",
    "min_k_plus": "Min-K++",
    "reference": "reference",
    "gradient_norm": "gradient norm",
}
"""Attack -> label."""
_GRADIENT = "answer_gradient_norm"  # optional column: it costs a backward pass per row


def membership_metrics(inputs: Inputs) -> Mapping[str, MetricValue]:
    """mia_<attack>_auc, mia_<attack>_tpr and privleak, of forget rows against holdout rows; {} without holdout rows."""
    table, retrained, options = inputs.table, inputs.retrained, inputs.options
    if not inputs.rows("holdout").num_rows:
        return {}
    rows = [rows_of(table, name) for name in ("forget", "holdout")]
    references = None if retrained is None else [rows_of(retrained, name) for name in ("forget", "holdout")]
    if references is None:
        unusable: str | None = NEEDS_RETRAINED
    else:
        same = all(same_rows(*pair) for pair in zip(rows, references, strict=True))
        unusable = None if same else "the retrained model was evaluated on other forget or holdout rows"
    result: dict[str, MetricValue] = {}
    for attack in ATTACKS:
        if attack == "gradient_norm" and _GRADIENT not in table.column_names:
            continue
        scores = unusable if attack == "reference" and unusable else _both(rows, attack, references)
        auc, rate = f"mia_{attack}_auc", f"mia_{attack}_tpr"
        if isinstance(scores, str):
            result |= {auc: MetricValue.absent(scores), rate: MetricValue.absent(scores)}
            continue
        there = [~np.isnan(values) for values in scores]
        kept = [values[some] for values, some in zip(scores, there, strict=True)]
        result[auc], result[rate] = attack_metrics(
            kept[0], kept[1], name=f"mia_{attack}", clusters=_kept_clusters(rows, there), **options
        )
    result["privleak"] = MetricValue.absent(unusable) if unusable else _privleak(rows, references or [], options)
    return result


def _privleak(rows: list[pa.Table], references: list[pa.Table], options: dict[str, int]) -> MetricValue:
    own, other = _both(rows, "min_k"), _both(references, "min_k")
    if isinstance(own, str):
        return MetricValue.absent(own)
    if isinstance(other, str):
        return MetricValue.absent(f"retrained model: {other}")
    there = [~np.isnan(one) & ~np.isnan(two) for one, two in zip(own, other, strict=True)]
    model, retrained = ((scores[0][there[0]], scores[1][there[1]]) for scores in (own, other))
    return privleak_metric(model, retrained, name="privleak", clusters=_kept_clusters(rows, there), **options)


def _both(
    rows: list[pa.Table], attack: str, references: list[pa.Table] | None = None
) -> tuple[FloatArray, FloatArray] | str:
    """An attack's (forget, holdout) scores, [rows] each NaN for an answer without tokens; or the reason."""
    both: list[FloatArray] = []
    for number, name in enumerate(("forget", "holdout")):
        if rows[number].num_rows == 0:
            return f"no {name} rows were evaluated (evaluation.sets.{name})"
        scores = _attack_scores(rows[number], name, attack, None if references is None else references[number])
        if isinstance(scores, str):
            return scores
        if np.isnan(scores).all():
            return f"no answer of the {name} rows has a token other than the end-of-text token"
        both.append(scores)
    return both[0], both[1]


def _attack_scores(rows: pa.Table, name: str, attack: str, reference: pa.Table | None) -> FloatArray | str:
    nll = finite(rows, name, "answer_nll")
    if isinstance(nll, str) or attack == "loss":
        return nll
    if attack == "gradient_norm":
        return finite(rows, name, _GRADIENT)
    if attack in ("min_k", "min_k_plus"):
        column = "answer_logprobs" if attack == "min_k" else "answer_zscores"
        return of_tokens(rows, name, column, membership.min_k)
    score: Callable[[FloatArray, FloatArray], FloatArray] = membership.zlib_score
    other = finite(rows, name, "answer_zlib_bytes")
    if attack == "reference" and reference is not None:
        score, other = membership.reference_score, finite(reference, name, "answer_nll")
    return other if isinstance(other, str) else score(nll, other)


def _kept_clusters(rows: list[pa.Table], there: list[np.ndarray]) -> tuple[Clusters, Clusters]:
    labels = [clusters_of(those) for those in rows]
    forget, holdout = (None if one is None else one[some] for one, some in zip(labels, there, strict=True))
    return forget, holdout


for _attack, _words in ATTACKS.items():
    for _rate, _what in (("auc", "AUC"), ("tpr", "TPR at 1 % FPR")):
        register(
            Metric(
                name=f"mia_{_attack}_{_rate}",
                label=f"Membership {_words} {_what}",
                better="retrained",
                group="Membership inference",
                compute=membership_metrics,
                needs=frozenset({"holdout", "retrained"} if _attack == "reference" else {"holdout"}),
            )
        )
register(
    Metric(
        name="privleak", label="PrivLeak", better="zero", group="Membership inference", compute=membership_metrics,
        needs=frozenset({"holdout", "retrained"}),
    )
)  # fmt: skip
