"""Evaluation rows as tokens, and the losses of their answers: shared by the attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.layouts import row_tokens
from ofmu_ray.evaluation.rows import EvaluationRow
from ofmu_ray.metrics.functions import FloatArray, probability
from ofmu_ray.models.answers import Text


def answer_texts(rows: Sequence[EvaluationRow], template: Template) -> list[Text]:
    """Each row's question and right answer, or its passage.

    Raises UserError, naming the row, if no answer token is left.
    """
    right = [replace(row, paraphrase=None, wrong=()) for row in rows]
    encoded = [tokens.texts[0] for tokens in row_tokens(right, template)]
    for row, text in zip(rows, encoded, strict=True):
        if text.only_prompt:
            raise UserError(
                f"evaluation.sets.{row.set}: row {row.row_id} has no answer token left within data.format.max_length; "
                "raise it"
            )
    return [(text.input_ids, text.prompt_tokens) for text in encoded]


def measured(rows: Sequence[EvaluationRow], nll: FloatArray, **columns: Any) -> pa.Table:
    """Columns row_id, cluster, answer_nll (mean over tokens including EOS, in nats), probability, and `columns`.

    A value of `columns` is an array [rows], or a string or number for all rows.
    """
    table: dict[str, Any] = {
        "row_id": pa.array([row.row_id for row in rows], pa.string()),
        "cluster": pa.array([row.cluster for row in rows], pa.string()),
        "answer_nll": pa.array(nll, pa.float64()),
        "probability": pa.array(probability(nll), pa.float64()),
    }
    for name, value in columns.items():
        table[name] = pa.repeat(value, len(rows)) if isinstance(value, (str, int)) else value
    return pa.table(table)
