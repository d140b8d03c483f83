"""A model's metrics under OpenUnlearning's names and by its conventions, to be put beside a published table.

Names as in its TOFU_SUMMARY.json (locuslab/open-unlearning, December 2025). Most are metrics of ours by another name.
What differs is computed here: extraction strength has a floor of 1/n, probabilities of `ra` and `wf` exist plain and
normalised, and ratios have 1e-10 in their denominators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics.columns import of_tokens, rows_of
from ofmu_ray.metrics.functions import FloatArray, pad_ragged
from ofmu_ray.metrics.memorisation import extraction_strength_with_floor

SMALL = 1e-10
SETS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
"""Its name of a set -> ours."""
SAME = {
    "forget_quality": "forget_quality",
    "exact_memorization": "forget_exact_memorisation",
    "mia_loss": "mia_loss_auc",
    "mia_zlib": "mia_zlib_auc",
    "mia_min_k": "mia_min_k_auc",
    "mia_min_k_plus_plus": "mia_min_k_plus_auc",
    "mia_reference": "mia_reference_auc",
    "mia_gradnorm": "mia_gradient_norm_auc",
    "privleak": "privleak",
    **{f"{peer}_Q_A_ROUGE": f"{own}_rouge" for peer, own in SETS.items()},
}
"""Its name -> our metric with the same definition."""
UTILITY = ("retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised")


def peer_values(table: pa.Table, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """OpenUnlearning's name -> value of a model; None where the rows do not give it.

    `table`: per-row values as `evaluate_model` returns them; `results`: our metrics of the same model, as in
    metrics.json.
    """
    values = {peer: results.get(own, {}).get("value") for peer, own in SAME.items()}
    for peer, own in SETS.items():
        values |= _of_set(peer, rows_of(table, own))
    matches = of_tokens(rows_of(table, "forget"), "forget", "answer_matches", extraction_strength_with_floor)
    values["extraction_strength"] = None if isinstance(matches, str) else _mean(matches)
    scores = [values[name] for name in UTILITY]
    scores += [values[f"{peer}_{score}"] for peer in ("retain", "ra", "wf") for score in ("Q_A_ROUGE", "Truth_Ratio")]
    values["model_utility"] = _harmonic_mean(scores)
    return dict(sorted(values.items()))


def _of_set(peer: str, rows: pa.Table) -> dict[str, float | None]:
    """Probabilities and truth ratio of a set's rows."""
    options = peer in ("ra", "wf")
    answer = np.exp(-_floats(rows["answer_nll"]))
    wrong_nll = pad_ragged(rows["wrong_nll"].to_pylist())
    has_wrong = ~np.isnan(wrong_nll).all(axis=1)
    wrong = np.exp(-wrong_nll)
    right = answer if options else np.exp(-_floats(rows["paraphrase_nll"]))
    ratio = np.exp(-_row_means(wrong_nll)) / (right + SMALL)
    closeness = np.minimum(ratio, 1 / (ratio + SMALL)) if peer == "forget" else np.maximum(0.0, 1 - ratio)
    found = {
        f"{peer}_Q_A_Prob": answer,
        f"{peer}_Q_A_PERT_Prob": _row_means(wrong),
        "forget_truth_ratio" if peer == "forget" else f"{peer}_Truth_Ratio": closeness,
    }
    if options:
        total = answer + np.nansum(wrong, axis=1) + SMALL
        found[f"{peer}_Q_A_Prob_normalised"] = np.where(has_wrong, answer / total, np.nan)
    else:
        found[f"{peer}_Q_A_PARA_Prob"] = right
    return {name: _mean(column) for name, column in found.items()}


def _floats(column: pa.ChunkedArray) -> FloatArray:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)


def _row_means(values: FloatArray) -> FloatArray:
    """Means of the numbers in each row, NaN without any. [rows, wrong] -> [rows]."""
    there = ~np.isnan(values)
    counts = there.sum(axis=1)
    return np.where(counts > 0, np.where(there, values, 0.0).sum(axis=1) / np.maximum(counts, 1), np.nan)


def _mean(values: FloatArray) -> float | None:
    """Over the rows that have a value; None if there is none, or one that is not finite."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size and np.isfinite(kept).all() else None


def _harmonic_mean(scores: list[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    return len(known) / sum(1 / score for score in known) if all(known) else 0.0
