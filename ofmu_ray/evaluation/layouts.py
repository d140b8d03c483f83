"""Evaluation rows as token ids, by what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ofmu_ray.data.template import AnswerTokens, Template
from ofmu_ray.data.windows import TextLayout
from ofmu_ray.evaluation.rows import EvaluationRow


class RowTokens(NamedTuple):
    """A row as tokens."""

    texts: list[AnswerTokens]
    """One for each of `EvaluationRow.texts`."""
    start: int
    """Leading tokens of the first text that a generation starts from."""


def row_tokens(rows: Sequence[EvaluationRow], template: Template) -> list[RowTokens]:
    """The tokens of a set's rows, all of one kind.

    Questions and chats: prompt, answer, EOS. Passages: start token, passage, the token after it.
    """
    if rows and rows[0].kind == "text":
        layout = TextLayout(template.tokenizer, template.config)
        passages = [layout.passage(row.question, row.answer, ends=row.ends) for row in rows]
        return [RowTokens([AnswerTokens(ids, 1, 0)], start) for ids, start in passages]
    places = [index for index, row in enumerate(rows) for _ in row.texts]
    answers = [text for row in rows for text in row.texts]
    if rows and rows[0].kind == "messages":
        chats = [[{"role": role, "content": content} for role, content in rows[index].turns] for index in places]
        encoded = template.encode_chats(chats, answers)
    else:
        encoded = template.encode_rows([rows[index].question for index in places], answers)
    texts: list[list[AnswerTokens]] = [[] for _ in rows]
    for index, text in zip(places, encoded, strict=True):
        texts[index].append(text)
    return [RowTokens(row, row[0].prompt_tokens) for row in texts]
