"""One model's answers to evaluation rows, in independent units of work."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.data.choices import ChoiceRow, Scoring
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.generation import generate, stop_ids
from ofmu_ray.evaluation.layouts import row_tokens
from ofmu_ray.evaluation.multiple_choice import choice_table, prompt
from ofmu_ray.evaluation.row_pass import RowValues, row_values
from ofmu_ray.evaluation.rows import MEASURED, EvaluationRow, with_row_metrics
from ofmu_ray.evaluation.scoring import TokenScores, length_sorted, mean_nll, token_scores
from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics.degeneration import ngram_entropy
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.rouge import rouge_l_recall
from ofmu_ray.models.answers import Text
from ofmu_ray.models.tree import takes_trees, tree_of

_TOGETHER = 2  # concurrent generations per row of a batch: each step has one token per generation, not a text
_UNIT_BATCHES = 4  # batches per unit, over which generations are sorted; processes work on complete units


@dataclass(frozen=True)
class Unit:
    """Rows of one set that go through the model together."""

    set: str
    rows: Sequence[int]
    texts: Sequence[Sequence[Text]]
    """Per row, the texts to score after the same prompt: right answer, paraphrase (if any), wrong answers."""
    paraphrased: Sequence[bool]
    """Per row, whether its second text is a paraphrase."""
    references: Sequence[str] | None
    """The right answers to compare generations with; None: with the texts' tokens after `starts`."""
    batch_size: int
    """Texts per forward pass; generations run in batches of twice this size."""
    starts: Sequence[int] | None = None
    """Per row, the leading tokens of its first text that the generation starts from; None: its prompt."""
    choices: Sequence[ChoiceRow] | None = None
    """Multiple-choice questions; then `texts` are only their prompts, and nothing is generated."""
    scoring: Scoring = "letters"

    @property
    def prompts(self) -> list[Sequence[int]]:
        """Tokens that the generations start from."""
        starts = self.starts or [texts[0][1] for texts in self.texts]
        return [texts[0][0][:start] for texts, start in zip(self.texts, starts, strict=True)]


Result = Mapping[int, Mapping[str, Any]]
"""Row -> columns of MEASURED."""


def plan(rows: Sequence[EvaluationRow], template: Template, batch_size: int) -> list[Unit]:
    """A set's units: length-sorted batches, generations (the slow ones) first.

    The plan depends only on rows and batch size, so values do not depend on who runs which unit. Raises UserError,
    naming the row, if a text has no answer token left within data.format.max_length.
    """
    name = rows[0].set
    if rows[0].choice is not None:
        return _choice_units(rows, template, batch_size)
    encoded = row_tokens(rows, template)
    for row, tokens in zip(rows, encoded, strict=True):
        if any(text.only_prompt for text in tokens.texts):
            raise UserError(
                f"evaluation.sets.{name}: row {row.row_id} has no answer token left within data.format.max_length; "
                "raise it"
            )
    texts = [[(text.input_ids, text.prompt_tokens) for text in tokens.texts] for tokens in encoded]
    return [
        Unit(
            name,
            batch,
            [texts[row] for row in batch],
            [rows[row].paraphrase is not None for row in batch],
            None if rows[0].kind == "text" else [rows[row].answer for row in batch],
            batch_size=batch_size,
            starts=[encoded[row].start for row in batch],
        )
        for batch in length_sorted([tokens.start for tokens in encoded], _UNIT_BATCHES * batch_size)
    ]


def _choice_units(rows: Sequence[EvaluationRow], template: Template, batch_size: int) -> list[Unit]:
    choices = [row.choice for row in rows if row.choice is not None]
    scoring: Scoring = "cloze" if rows[0].kind == "cloze" else "letters"
    prompts = template.tokenizer([prompt(choice, scoring) for choice in choices])["input_ids"]
    return [
        Unit(
            rows[0].set,
            batch,
            [[(prompts[row], len(prompts[row]))] for row in batch],
            [False] * len(batch),
            None,
            batch_size=batch_size,
            choices=[choices[row] for row in batch],
            scoring=scoring,
        )
        for batch in length_sorted([len(ids) for ids in prompts], _UNIT_BATCHES * batch_size)
    ]


def assemble(rows: Sequence[EvaluationRow], results: Sequence[Result]) -> pa.Table:
    """The set's table (schema MEASURED) from the results of all units of its plan."""
    values = {index: columns for result in results for index, columns in result.items()}
    records = [
        {
            "row_id": row.row_id,
            "set": row.set,
            "index": row.index,
            "answer_zlib_bytes": None if row.choice else len(zlib.compress(row.scored.encode())),
            "cluster": row.cluster,
            "kind": row.kind,
            **values[index],  # without columns of generations if there are none
        }
        for index, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, schema=MEASURED)


def _columns(answer: TokenScores, other_nll: Sequence[float], paraphrased: bool) -> dict[str, Any]:
    """The columns of MEASURED from teacher-forced passes."""
    return {
        "answer_nll": -float(np.mean(answer.logprobs)),
        "answer_tokens": len(answer.logprobs),
        "paraphrase_nll": other_nll[0] if paraphrased else None,
        "wrong_nll": list(other_nll[1:] if paraphrased else other_nll) or None,
        "answer_logprobs": answer.logprobs,
        "answer_matches": answer.matches,
        "answer_zscores": answer.zscores,
    }


class Scorer:
    """A causal language model of transformers (in eval mode) that scores units or complete sets of rows."""

    def __init__(self, model: Any, tokenizer: Any, template: Template, *, max_new_tokens: int = 200) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.max_new_tokens = max_new_tokens
        self.stop = stop_ids(model, tokenizer)

    def mean_nll(self, questions: Sequence[str], answers: Sequence[str], batch_size: int = 64) -> FloatArray:
        """Mean token loss of each answer to its question (nats, including EOS), [rows]."""
        encoded = self.template.encode_rows(questions, answers)
        return mean_nll(self.model, [(row.input_ids, row.prompt_tokens) for row in encoded], batch_size)

    def rows(self, rows: Sequence[EvaluationRow], batch_size: int = 64) -> pa.Table:
        """Per-row values of one set, in this process: MEASURED, `probability` and `truth_ratio`."""
        results = [result for _, result in self.run_all(plan(rows, self.template, batch_size))]
        return with_row_metrics(assemble(rows, results))

    @cached_property
    def shares_prompts(self) -> bool:
        """Whether the texts of a row share one pass (see `tree.takes_trees`)."""
        return takes_trees(self.model)

    def run(self, unit: Unit) -> Result:
        """One unit's values."""
        if unit.choices is not None:
            return self._chosen(unit, unit.choices)
        continues = unit.references is None  # the generation starts inside the text
        values = self._shared(unit) if self.shares_prompts and not continues else self._plain(unit)
        waiting = [row for row, value in enumerate(values) if not value.complete]
        prompts, generated = unit.prompts, [value.generated for value in values]
        more = generate(
            self.model,
            [[*prompts[row], *generated[row]] for row in waiting],
            max_new_tokens=[self.max_new_tokens - len(generated[row]) for row in waiting],
            stop=self.stop,
            batch_size=_TOGETHER * unit.batch_size,
        )
        for row, tokens in zip(waiting, more, strict=True):
            generated[row] += tokens
        return self._result(unit, values, generated)

    def run_all(self, units: Sequence[Unit]) -> Iterator[tuple[int, Result]]:
        """(index of the unit, its values) for every unit."""
        for number, unit in enumerate(units):
            yield number, self.run(unit)

    def _result(self, unit: Unit, values: Sequence[RowValues], new: Sequence[Sequence[int]]) -> Result:
        """`new`: the generated tokens of each row."""
        scores = [
            _columns(value.answer, value.other_nll, paraphrased)
            for value, paraphrased in zip(values, unit.paraphrased, strict=True)
        ]
        if self.max_new_tokens == 0:
            return dict(zip(unit.rows, scores, strict=True))
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
        recalls = rouge_l_recall(unit.references or self._continuations(unit), texts)
        return {
            row: {
                **columns,
                "rouge_l_recall": recall,
                "generated": text.strip(),
                "generated_tokens": len(tokens),
                "generated_empty": not text.strip(),
                "repetition": metrics.repetition(tokens),
                "generated_entropy": ngram_entropy(tokens),
            }
            for row, columns, text, tokens, recall in zip(unit.rows, scores, texts, new, recalls, strict=True)
        }

    def _chosen(self, unit: Unit, choices: Sequence[ChoiceRow]) -> Result:
        size = min(unit.batch_size, 16)  # prompts are long
        table = choice_table(self.model, self.tokenizer, choices, scoring=unit.scoring, batch_size=size)
        return dict(zip(unit.rows, table.select(["correct", "chance"]).to_pylist(), strict=True))

    def _continuations(self, unit: Unit) -> list[str]:
        """What follows the texts' starts, as far as a generation may go."""
        places = zip(unit.texts, unit.prompts, strict=True)
        ids = [texts[0][0][len(start) :][: self.max_new_tokens] for texts, start in places]
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in ids]

    def _shared(self, unit: Unit) -> list[RowValues]:
        return row_values(self.model, [tree_of(texts) for texts in unit.texts], self.stop, self.max_new_tokens)

    def _plain(self, unit: Unit) -> list[RowValues]:
        others = iter(mean_nll(self.model, [text for texts in unit.texts for text in texts[1:]], unit.batch_size))
        answers = token_scores(self.model, [texts[0] for texts in unit.texts], unit.batch_size)
        return [
            RowValues(answer, [float(next(others)) for _ in texts[1:]], [], self.max_new_tokens == 0)
            for answer, texts in zip(answers, unit.texts, strict=True)
        ]
