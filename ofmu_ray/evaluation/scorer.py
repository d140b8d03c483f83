"""One model's answers to evaluation rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.data.choices import ChoiceRow
from ofmu_ray.data.muse_sets import MuseKind
from ofmu_ray.data.template import Template
from ofmu_ray.evaluation.generation import generate, generation_columns, stop_ids
from ofmu_ray.evaluation.multiple_choice import choice_table
from ofmu_ray.evaluation.muse_texts import muse_values
from ofmu_ray.evaluation.row_pass import RowValues, row_values
from ofmu_ray.evaluation.rows import EvaluationRow, with_row_metrics
from ofmu_ray.evaluation.scoring import TokenScores, mean_nll, token_scores
from ofmu_ray.evaluation.units import Result, Unit, assemble, plan
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.rouge import rouge_l_recall
from ofmu_ray.models.tree import takes_trees, tree_of

_TOGETHER = 2  # concurrent generations per row of a batch: each step has one token per generation, not a text


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
        if unit.muse is not None:
            return self._muse(unit, unit.muse)
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
            row: {**columns, "rouge_l_recall": recall, **generation_columns(text, tokens)}
            for row, columns, text, tokens, recall in zip(unit.rows, scores, texts, new, recalls, strict=True)
        }

    def _chosen(self, unit: Unit, choices: Sequence[ChoiceRow]) -> Result:
        size = min(unit.batch_size, 16)  # prompts are long
        table = choice_table(self.model, self.tokenizer, choices, scoring=unit.scoring, batch_size=size)
        return dict(zip(unit.rows, table.select(["correct", "chance"]).to_pylist(), strict=True))

    def _muse(self, unit: Unit, kind: MuseKind) -> Result:
        names = [f"{unit.set}-{row}" for row in unit.rows]
        texts = [row[0] for row in unit.texts]
        values = muse_values(
            self.model, self.tokenizer, kind, texts, unit.references, names, stop=self.stop, batch_size=unit.batch_size
        )
        return dict(zip(unit.rows, values, strict=True))

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
