"""Evaluation rows, and the table of a model's values on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.config import FormatConfig
from ofmu_ray.config.data import Kind
from ofmu_ray.data.choices import ChoiceRow, Scoring
from ofmu_ray.data.muse_sets import MuseKind
from ofmu_ray.errors import UserError
from ofmu_ray.metrics import functions as metrics

OPTION_SETS = frozenset({"real_authors", "world_facts"})
"""Sets whose probability is normalised over the options and whose truth ratio uses the answer itself."""

MEASURED = pa.schema(
    [
        ("row_id", pa.string()),
        ("set", pa.string()),
        ("index", pa.int32()),
        ("answer_nll", pa.float64()),  # mean over the answer tokens including EOS; nats
        ("answer_tokens", pa.int32()),  # including EOS
        ("paraphrase_nll", pa.float64()),
        ("wrong_nll", pa.list_(pa.float64())),
        ("rouge_l_recall", pa.float64()),
        ("generated", pa.string()),
        ("generated_tokens", pa.int32()),  # without EOS
        ("generated_empty", pa.bool_()),
        ("repetition", pa.float64()),  # share of the generation's token 4-grams that repeat an earlier one
        ("generated_entropy", pa.float64()),  # n-gram entropy of the generated tokens; bits
        ("answer_logprobs", pa.list_(pa.float64())),  # log p of each answer token, EOS last; nats
        ("answer_matches", pa.list_(pa.bool_())),  # whether the token was the most likely one
        ("answer_zscores", pa.list_(pa.float64())),  # Min-K++: log p, standardised over the vocabulary
        ("answer_zlib_bytes", pa.int32()),  # of the answer's text in UTF-8, compressed
        ("cluster", pa.string()),  # rows that the bootstrap draws together (one person, one author, one document)
        ("correct", pa.bool_()),  # multiple choice: whether the right one was chosen
        ("chance", pa.float64()),  # multiple choice: 1 / number of choices
        ("kind", pa.string()),  # text: the "answer" is the whole passage, the generation continues its first half
        ("rouge_l_f", pa.float64()),  # MUSE's continuations and answers: F-measure, words not stemmed
    ]
)
"""Values per row and model (this is what the cache stores)."""


@dataclass(frozen=True)
class EvaluationRow:
    """One question with its right answer and, if the set has them, a paraphrase and wrong answers.

    `cluster`: rows of one cluster are not independent (the rows of one person); None: an independent row. Of kind text,
    `question` and `answer` are the halves of a passage, and `ends` says whether its document ends with it. Of kind
    messages, `turns` are the chat before the answer: (role, content). Of kind letters or cloze, `choice` is a
    multiple-choice question, scored so. Of MUSE's kinds (`muse_sets`), `turns` are examples: (question, answer).
    """

    set: str
    index: int
    question: str
    answer: str
    paraphrase: str | None = None
    wrong: tuple[str, ...] = ()
    cluster: str | None = None
    kind: Kind | Scoring | MuseKind = "qa"
    ends: bool = True
    turns: tuple[tuple[str, str], ...] = ()
    choice: ChoiceRow | None = None

    @property
    def row_id(self) -> str:
        return f"{self.set}-{self.index}"

    @property
    def scored(self) -> str:
        """The text whose tokens are scored."""
        return self.question + self.answer if self.kind == "text" else self.answer

    @property
    def texts(self) -> list[str]:
        """Texts to score: answer, paraphrase (if any), wrong answers."""
        return [self.answer, *([] if self.paraphrase is None else [self.paraphrase]), *self.wrong]


def is_private(set_name: str) -> bool:
    """Whether the set's texts are personal data: forget rows, and probes of them (`forget_...`, `..._forget`)."""
    return "forget" in set_name.split("_")


def evaluation_rows(name: str, rows: Sequence[Mapping[str, Any]], fmt: FormatConfig) -> list[EvaluationRow]:
    """The checked rows of a set, as `ofmu_ray.data.evaluation_rows` gives them.

    Questions and answers are in the columns of `data.format`, or in TOFU's.

    Raises UserError, naming the row by id, for an empty set, a missing column, or a cell that is not a text.
    """
    if not rows:
        raise UserError(f"evaluation.sets.{name} has no rows: give a file with rows, or null")
    return [_row(name, index, row, fmt) for index, row in enumerate(rows)]


def _row(name: str, index: int, row: Mapping[str, Any], fmt: FormatConfig) -> EvaluationRow:
    if "choice" in row:
        choice = ChoiceRow(**{**row["choice"], "choices": tuple(row["choice"]["choices"])})
        right = choice.choices[choice.answer]
        return EvaluationRow(
            name, index, choice.question, right, cluster=choice.cluster, kind=row["kind"], choice=choice
        )
    if row.get("kind", "qa") != "qa":  # passages, turns and MUSE's rows have been checked where they were read
        turns = row.get("examples") or [(turn["role"], turn["content"]) for turn in row.get("turns", ())]
        texts, ends = (row["question"], row["answer"]), row.get("ends", True)
        cluster = row.get("cluster")
        return EvaluationRow(name, index, *texts, cluster=cluster, kind=row["kind"], ends=ends, turns=tuple(turns))

    def text(value: object, column: str) -> str:
        if isinstance(value, str) and value.strip():
            return value
        kind = "an empty text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise UserError(f"evaluation.sets.{name}: row {name}-{index} has {kind} in column {column!r}; it needs a text")

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

    A value is null if the row lacks its inputs (wrong answers, a paraphrase). Values that are not finite are kept.
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
    unscored = measured["answer_nll"].is_null().to_numpy()
    lacks_options, lacks_ratio = options & ~has_wrong | unscored, ~(has_wrong & has_correct)
    table = measured.append_column("probability", pa.array(probability, mask=lacks_options))
    return table.append_column("truth_ratio", pa.array(ratio, mask=lacks_ratio))


def without_private_text(table: pa.Table) -> pa.Table:
    """The table with the generations of private sets set to null: safe to keep after the run."""
    names, texts = table["set"].to_pylist(), table["generated"].to_pylist()
    kept = [None if is_private(name) else text for name, text in zip(names, texts, strict=True)]
    column = table.schema.get_field_index("generated")
    return table.set_column(column, "generated", pa.array(kept, type=pa.string()))


def _with_nan(column: pa.ChunkedArray) -> metrics.FloatArray:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)
