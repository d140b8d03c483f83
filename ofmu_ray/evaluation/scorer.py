"""One model's answers to evaluation rows, in independent units of work."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ofmu_ray.errors import UserError
from ofmu_ray.evaluation import metrics
from ofmu_ray.evaluation.degeneration import ngram_entropy
from ofmu_ray.evaluation.generation import generate_batch, stop_ids
from ofmu_ray.evaluation.metrics import FloatArray
from ofmu_ray.evaluation.rouge import rouge_l_recall
from ofmu_ray.evaluation.rows import MEASURED, EvaluationRow, with_row_metrics
from ofmu_ray.evaluation.scoring import Text, TokenScores, length_sorted, mean_nll, token_scores


class RowTemplate(Protocol):
    """What evaluation needs of `ofmu_ray.data.template.Template`."""

    def encode_prompt(self, question: str) -> list[int]: ...

    def encode_rows(self, questions: Sequence[str], answers: Sequence[str]) -> Sequence[Any]: ...


@dataclass(frozen=True)
class ScoreUnit:
    """Texts of one set that go through the model together; `places` are (row, number of the text in the row)."""

    set: str
    places: Sequence[tuple[int, int]]
    texts: Sequence[Text]


@dataclass(frozen=True)
class GenerateUnit:
    """Prompts of one set that are answered together, and the right answers to compare with."""

    set: str
    rows: Sequence[int]
    prompts: Sequence[Sequence[int]]
    references: Sequence[str]


Unit = ScoreUnit | GenerateUnit
Result = Mapping[Any, Any]
"""(row, text) -> TokenScores of a ScoreUnit; row -> columns of MEASURED of a GenerateUnit."""


def plan(rows: Sequence[EvaluationRow], template: RowTemplate, batch_size: int) -> list[Unit]:
    """A set's units: length-sorted batches, generations (the slow ones) first.

    The plan depends on rows and batch size only, so the values do not depend on who runs which unit. Raises UserError,
    naming the row, when a text leaves no answer token within data.format.max_length.
    """
    name = rows[0].set
    prompts = [template.encode_prompt(row.question) for row in rows]
    places = [(index, number) for index, row in enumerate(rows) for number in range(len(row.texts))]
    encoded = template.encode_rows(
        [rows[index].question for index, _ in places], [rows[index].texts[number] for index, number in places]
    )
    for (index, _), text in zip(places, encoded, strict=True):
        if text.only_prompt:
            raise UserError(
                f"evaluation.sets.{name}: row {rows[index].row_id} has no answer token left within "
                "data.format.max_length; raise it"
            )
    texts = [(text.input_ids, text.prompt_tokens) for text in encoded]
    units: list[Unit] = [
        GenerateUnit(name, batch, [prompts[row] for row in batch], [rows[row].answer for row in batch])
        for batch in length_sorted([len(prompt) for prompt in prompts], batch_size)
    ]
    return units + [
        ScoreUnit(name, [places[position] for position in batch], [texts[position] for position in batch])
        for batch in length_sorted([len(ids) for ids, _ in texts], batch_size)
    ]


def assemble(rows: Sequence[EvaluationRow], results: Sequence[Result]) -> pa.Table:
    """The set's table (schema MEASURED) from the results of all units of its plan."""
    found: dict[Any, Any] = {}
    for result in results:
        found.update(result)
    records = []
    for index, row in enumerate(rows):
        scores: list[TokenScores] = [found[index, number] for number in range(len(row.texts))]
        losses = [-float(np.mean(each.logprobs)) for each in scores]
        first_wrong = 1 if row.paraphrase is None else 2
        records.append(
            {
                "row_id": row.row_id,
                "set": row.set,
                "index": row.index,
                "answer_nll": losses[0],
                "answer_tokens": len(scores[0].logprobs),
                "paraphrase_nll": None if row.paraphrase is None else losses[1],
                "wrong_nll": losses[first_wrong:] or None,
                "answer_logprobs": scores[0].logprobs,
                "answer_matches": scores[0].matches,
                "answer_zscores": scores[0].zscores,
                "answer_zlib_bytes": len(zlib.compress(row.answer.encode())),
                "cluster": row.cluster,
                **found[index],
            }
        )
    return pa.Table.from_pylist(records, schema=MEASURED)


class Scorer:
    """A causal language model of transformers (in eval mode), ready to work on units or on whole sets of rows."""

    def __init__(self, model: Any, tokenizer: Any, template: RowTemplate, *, max_new_tokens: int = 200) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.max_new_tokens = max_new_tokens
        self.stop = stop_ids(model, tokenizer)

    def mean_nll(self, questions: Sequence[str], answers: Sequence[str], batch_size: int = 64) -> FloatArray:
        """Mean token loss of each answer to its question (nats, EOS counted), [rows]."""
        encoded = self.template.encode_rows(questions, answers)
        return mean_nll(self.model, [(row.input_ids, row.prompt_tokens) for row in encoded], batch_size)

    def rows(self, rows: Sequence[EvaluationRow], batch_size: int = 64) -> pa.Table:
        """Per-row values of one set, in this process: MEASURED, `probability` and `truth_ratio`."""
        results = list(self.run_all(plan(rows, self.template, batch_size)))
        return with_row_metrics(assemble(rows, results))

    def run_all(self, units: Sequence[Unit]) -> Iterator[Result]:
        return (self.run(unit) for unit in units)

    def run(self, unit: Unit) -> Result:
        """One unit's values."""
        if isinstance(unit, ScoreUnit):
            return dict(zip(unit.places, token_scores(self.model, unit.texts), strict=True))
        new = generate_batch(self.model, unit.prompts, max_new_tokens=self.max_new_tokens, stop=self.stop)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
        recalls = rouge_l_recall(unit.references, texts)
        return {
            row: {
                "rouge_l_recall": recall,
                "generated": text.strip(),
                "generated_tokens": len(tokens),
                "generated_empty": not text.strip(),
                "repetition": metrics.repetition(tokens),
                "generated_entropy": ngram_entropy(tokens),
            }
            for row, text, tokens, recall in zip(unit.rows, texts, new, recalls, strict=True)
        }
