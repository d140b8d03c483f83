"""Evaluation rows as independent units of work, and their results as a table."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ofmu_ray.data.choices import ChoiceRow, Scoring
from ofmu_ray.data.muse_sets import MUSE_SETS, MuseKind
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.layouts import row_tokens
from ofmu_ray.evaluation.multiple_choice import prompt
from ofmu_ray.evaluation.muse_texts import muse_tokens
from ofmu_ray.evaluation.rows import MEASURED, EvaluationRow
from ofmu_ray.evaluation.scoring import length_sorted
from ofmu_ray.models.answers import Text

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
    muse: MuseKind | None = None
    """Rows of MUSE: prompts to continue towards `references`, or documents to score."""

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
    if name in MUSE_SETS:
        return _muse_units(rows, template, batch_size)
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


def _muse_units(rows: Sequence[EvaluationRow], template: Template, batch_size: int) -> list[Unit]:
    texts, references = muse_tokens(rows, template.tokenizer)
    return [
        Unit(
            rows[0].set,
            batch,
            [[texts[row]] for row in batch],
            [False] * len(batch),
            None if references is None else [references[row] for row in batch],
            batch_size=batch_size,
            muse=MUSE_SETS[rows[0].set],
        )
        for batch in length_sorted([len(ids) for ids, _ in texts], _UNIT_BATCHES * batch_size)
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
