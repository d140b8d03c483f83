"""Evaluation rows in TOFU's layout, and the table of what a model makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.config import FormatConfig
from ofmu_ray.errors import UserError
from ofmu_ray.metrics import functions as metrics

OPTION_SETS = frozenset({"real_authors", "world_facts"})
"""Sets whose probability is normalised over the options and whose truth ratio starts from the answer itself."""

MEASURED = pa.schema(
    [
        ("row_id", pa.string()),
        ("set", pa.string()),
        ("index", pa.int32()),
        ("answer_nll", pa.float64()),  # mean over the answer's tokens, EOS counted; nats
        ("answer_tokens", pa.int32()),  # EOS counted
        ("paraphrase_nll", pa.float64()),
        ("wrong_nll", pa.list_(pa.float64())),
        ("rouge_l_recall", pa.float64()),
        ("generated", pa.string()),
        ("generated_tokens", pa.int32()),  # EOS not counted
        ("generated_empty", pa.bool_()),
        ("repetition", pa.float64()),  # share of the generation's token 4-grams that repeat an earlier one
        ("generated_entropy", pa.float64()),  # n-gram entropy of the generation's tokens; bits
        ("answer_logprobs", pa.list_(pa.float64())),  # log p of each token of the answer, EOS last; nats
        ("answer_matches", pa.list_(pa.bool_())),  # whether that token was the most likely one
        ("answer_zscores", pa.list_(pa.float64())),  # Min-K++: the log p, standardised over the vocabulary
        ("answer_zlib_bytes", pa.int32()),  # of the answer's text in UTF-8, compressed
        ("cluster", pa.string()),  # rows that are drawn together by the bootstrap (one person, one author)
    ]
)
"""What a model run leaves per row (the cache holds this)."""


@dataclass(frozen=True)
class EvaluationRow:
    """One question with its right answer and, where the set has them, a paraphrase and wrong answers.

    `cluster`: rows of one cluster are not independent of each other (one person's rows); None: a row of its own.
    """

    set: str
    index: int
    question: str
    answer: str
    paraphrase: str | None = None
    wrong: tuple[str, ...] = ()
    cluster: str | None = None

    @property
    def row_id(self) -> str:
        return f"{self.set}-{self.index}"

    @property
    def texts(self) -> list[str]:
        """Texts to score: answer, paraphrase (if any), wrong answers."""
        return [self.answer, *([] if self.paraphrase is None else [self.paraphrase]), *self.wrong]


def is_private(set_name: str) -> bool:
    """Whether the set's texts are personal data: forget rows, and probes of them (`forget_...`, `..._forget`)."""
    return "forget" in set_name.split("_")


def evaluation_rows(name: str, rows: Sequence[Mapping[str, Any]], fmt: FormatConfig) -> list[EvaluationRow]:
    """The set's rows, checked. Questions and answers stand in the columns of `data.format`, or in TOFU's.

    Raises UserError, naming the row by id, for an empty set, a missing column, and a cell that is no text.
    """
    if not rows:
        raise UserError(f"evaluation.sets.{name} has no rows: give a file with rows, or null")
    return [_row(name, index, row, fmt) for index, row in enumerate(rows)]


def _row(name: str, index: int, row: Mapping[str, Any], fmt: FormatConfig) -> EvaluationRow:
    def text(value: object, column: str) -> str:
        if isinstance(value, str) and value.strip():
            return value
        found = "an empty text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise UserError(f"evaluation.sets.{name}: row {name}-{index} has {found} in column {column!r}; it needs a text")

    def column(preferred: str, usual: str) -> str:
        chosen = preferred if preferred in row else usual
        if chosen not in row:
            has = ", ".join(sorted(map(str, row)))
            raise UserError(f"evaluation.sets.{name}: row {name}-{index} has no column {preferred!r}; it has: {has}")
        return text(row[chosen], chosen)

    paraphrase, cluster = row.get("paraphrased_answer"), row.get("cluster")
    wrong = row.get("perturbed_answer")
    wrong = [wrong] if isinstance(wrong, str) else ([] if wrong is None else list(wrong))
    return EvaluationRow(
        set=name,
        index=index,
        question=column(fmt.question, "question"),
        answer=column(fmt.answer, "answer"),
        paraphrase=None if paraphrase is None else text(paraphrase, "paraphrased_answer"),
        wrong=tuple(text(answer, "perturbed_answer") for answer in wrong),
        cluster=None if cluster is None else str(cluster),
    )


def with_row_metrics(measured: pa.Table) -> pa.Table:
    """Appends each row's `probability` (normalised over the options in OPTION_SETS) and `truth_ratio`.

    A value whose inputs the row lacks (wrong answers, a paraphrase) is null; one that is not finite stays so.
    """
    nll = measured["answer_nll"].to_numpy()
    paraphrase = _with_nan(measured["paraphrase_nll"])
    wrong_lists = measured["wrong_nll"].to_pylist()
    wrong = metrics.pad_ragged(wrong_lists)
    options = np.array([name in OPTION_SETS for name in measured["set"].to_pylist()])
    has_wrong = np.array([bool(values) for values in wrong_lists])
    has_correct = options | ~measured["paraphrase_nll"].is_null().to_numpy()
    probability = np.where(options, metrics.options_probability(nll, wrong), metrics.probability(nll))
    ratio = metrics.truth_ratio(np.where(options, nll, paraphrase), wrong)
    lacks_options, lacks_ratio = options & ~has_wrong, ~(has_wrong & has_correct)
    table = measured.append_column("probability", pa.array(probability, mask=lacks_options))
    return table.append_column("truth_ratio", pa.array(ratio, mask=lacks_ratio))


def without_private_text(table: pa.Table) -> pa.Table:
    """The table with the generations of private sets set to null: what may outlive the run."""
    names, texts = table["set"].to_pylist(), table["generated"].to_pylist()
    kept = [None if is_private(name) else text for name, text in zip(names, texts, strict=True)]
    column = table.schema.get_field_index("generated")
    return table.set_column(column, "generated", pa.array(kept, type=pa.string()))


def _with_nan(column: pa.ChunkedArray) -> metrics.FloatArray:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)
