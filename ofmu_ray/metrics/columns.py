"""Columns of the per-row table as arrays over a set's rows, or the reason for their absence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics.functions import FloatArray

_ANSWERS = {"probability", "truth_ratio"}  # only for rows with the required answers


def rows_of(table: pa.Table, name: str) -> pa.Table:
    """The set's rows, in the table's order."""
    import pyarrow.compute as pc  # 0.15 CPU s, which a refused command does not need

    return table.filter(pc.equal(table["set"], name))


def same_rows(one: pa.Table, other: pa.Table) -> bool:
    """Whether two tables contain the same rows in the same order."""
    return bool(one["row_id"].to_pylist() == other["row_id"].to_pylist())


def clusters_of(rows: pa.Table) -> np.ndarray | None:
    """The rows' clusters [rows]; a row without a cluster forms its own. None: no row has one."""
    if "cluster" not in rows.column_names or rows["cluster"].null_count == rows.num_rows:
        return None
    names = rows["cluster"].to_pylist()
    return np.array([f"row {row}" if name is None else f"cluster {name}" for row, name in enumerate(names)])


def of_texts(rows: pa.Table) -> bool:
    """Whether the rows are passages of documents, not questions with answers."""
    return "kind" in rows.column_names and rows.num_rows > 0 and rows["kind"][0].as_py() == "text"


def finite(rows: pa.Table, name: str, column: str) -> FloatArray | str:
    """The column [rows], NaN if a row lacks it; or why the set `name` has no usable values."""
    if column not in rows.column_names:
        return f"the rows of {name} were evaluated without {column}"
    missing = rows[column].is_null().to_numpy()
    if missing.all():
        if column not in _ANSWERS:
            return f"the {name} rows lack {column}"
        if of_texts(rows):
            return f"not applicable: the {name} rows are texts, without right and wrong answers"
        need = "perturbed_answer" if name in ("real_authors", "world_facts") else "paraphrased_answer, perturbed_answer"
        return f"the {name} rows lack the columns it needs ({need})"
    values = np.asarray(rows[column].cast(pa.float64()).fill_null(0.0).to_numpy(), dtype=np.float64)
    broken = int((~np.isfinite(values) & ~missing).sum())
    if broken:
        return f"the model's loss is not finite on {broken} of {len(values)} {name} rows"
    return np.where(missing, np.nan, values)


def of_tokens(rows: pa.Table, name: str, column: str, value: Callable[[Sequence[Any]], float]) -> FloatArray | str:
    """`value` of each row's list of token values without the last, the end-of-text token's, [rows]; or the reason."""
    if column not in rows.column_names or rows[column].null_count == rows.num_rows:
        return f"the rows of {name} were evaluated without {column}"
    lists = rows[column].to_pylist()
    return np.array([np.nan if tokens is None else value(tokens[:-1]) for tokens in lists], dtype=np.float64)


def right_answer_ratios(rows: pa.Table, name: str) -> FloatArray | str:
    """Truth ratios [rows] of probes, based on the answer itself if a row has no paraphrase; or the reason."""
    nll = finite(rows, name, "answer_nll")
    if isinstance(nll, str):
        return nll
    paraphrase = np.asarray(rows["paraphrase_nll"].cast(pa.float64()).to_numpy(), dtype=np.float64)
    wrong = metrics.pad_ragged(rows["wrong_nll"].to_pylist())
    has_wrong = ~np.isnan(wrong).all(axis=1)
    if not has_wrong.any():
        return f"the {name} rows lack the column it needs (perturbed_answer)"
    return metrics.truth_ratio(np.where(np.isnan(paraphrase), nll, paraphrase), wrong)
