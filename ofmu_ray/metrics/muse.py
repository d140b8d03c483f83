"""MUSE's metrics (Shi et al. 2024, arXiv 2407.06460) as its release computes them: percentages, and PrivLeak."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics.columns import finite, rows_of, same_rows
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import MetricValue, attack_metrics, privleak_metric
from ofmu_ray.metrics.membership import min_k
from ofmu_ray.metrics.registry import NEEDS_RETRAINED, Inputs, Metric, register

DOCUMENTS = ("forget_documents", "holdout_documents")


def rouge_l(rows: pa.Table, name: str) -> FloatArray | str:
    """100 x ROUGE-L F-measure."""
    values = finite(rows, name, "rouge_l_f")
    return values if isinstance(values, str) else 100.0 * values


def privacy(inputs: Inputs) -> Mapping[str, MetricValue]:
    """muse_min_k_auc and muse_privleak of whole documents; {} without them.

    The AUC is the release's, P(a holdout document is likelier than a forget one): 0 if forget documents are plainly
    members. PrivLeak = 100 (AUC - retrained AUC) / retrained AUC, which is `membership.privleak` of 1 - AUC.
    """
    rows = [inputs.rows(name) for name in DOCUMENTS]
    if not any(those.num_rows for those in rows):
        return {}
    for those, name in zip(rows, DOCUMENTS, strict=True):
        if not those.num_rows:
            reason = f"no {name} were evaluated (evaluation.sets.{name})"
            return dict.fromkeys(("muse_min_k_auc", "muse_privleak"), MetricValue.absent(reason))
    scores = _scores(rows)
    if isinstance(scores, str):
        return dict.fromkeys(("muse_min_k_auc", "muse_privleak"), MetricValue.absent(scores))
    auc, _ = attack_metrics(*reversed(scores), name="muse_min_k", samples=inputs.samples, seed=inputs.seed)
    return {"muse_min_k_auc": auc, "muse_privleak": _privleak(inputs, rows, scores)}


def _privleak(inputs: Inputs, rows: list[pa.Table], scores: tuple[FloatArray, FloatArray]) -> MetricValue:
    if inputs.retrained is None:
        return MetricValue.absent(NEEDS_RETRAINED)
    others = [rows_of(inputs.retrained, name) for name in DOCUMENTS]
    if not all(same_rows(*pair) for pair in zip(rows, others, strict=True)):
        return MetricValue.absent("the retrained model was evaluated on other documents")
    reference = _scores(others)
    if isinstance(reference, str):
        return MetricValue.absent(f"retrained model: {reference}")
    return privleak_metric(scores, reference, name="muse_privleak", samples=inputs.samples, seed=inputs.seed)


def _scores(rows: list[pa.Table]) -> tuple[FloatArray, FloatArray] | str:
    """Min-40 % of each forget and each holdout document, [rows]: higher is less likely; or why there are none."""
    both = []
    for those, name in zip(rows, DOCUMENTS, strict=True):
        nll = finite(those, name, "answer_nll")
        if isinstance(nll, str):
            return nll
        both.append(np.array([min_k(logprobs) for logprobs in those["answer_logprobs"].to_pylist()], dtype=np.float64))
    return both[0], both[1]


register(
    Metric(
        name="muse_verbatim", label="MUSE verbatim memorisation", better="retrained", alone="low", group="Forgetting",
        set="forget_verbatim", values=rouge_l, needs=frozenset({"forget_verbatim"}), paired="mean", headline=True,
    ),
    Metric(
        name="muse_forget_knowledge", label="MUSE knowledge memorisation", better="retrained", alone="low",
        group="Forgetting", set="forget_knowledge", values=rouge_l, needs=frozenset({"forget_knowledge"}),
        paired="mean", headline=True,
    ),
    Metric(
        name="muse_retain_knowledge", label="MUSE utility (knowledge to keep)", better="high", group="Utility",
        set="retain_knowledge", values=rouge_l, needs=frozenset({"retain_knowledge"}), paired="mean", headline=True,
    ),
    Metric(
        name="muse_min_k_auc", label="MUSE Min-40 % AUC", better="retrained", group="Membership inference",
        compute=privacy, needs=frozenset(DOCUMENTS),
    ),
    Metric(
        name="muse_privleak", label="MUSE PrivLeak", better="zero", group="Membership inference", compute=privacy,
        needs=frozenset({*DOCUMENTS, "retrained"}), headline=True,
    ),
)  # fmt: skip
