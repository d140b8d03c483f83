"""Alternative answers to forget questions from the reference model: its prompts, and the rows made of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofmu_ray.data.sidecar import numbered
from ofmu_ray.data.template import Template
from ofmu_ray.features.protocol import Row
from ofmu_ray.features.refusals import answer_tokens, with_answer


def alternative_prompts(
    rows: Sequence[Row], count: int, prompt: str | None, template: Template
) -> list[dict[str, Any]]:
    """The prompts, `count` per row: {row_id, input_ids}, with the alternative's id in `row_id`."""
    prompts = []
    for row in rows:
        ids = list(row["input_ids"][: row["prompt_tokens"]])
        if prompt is not None:
            question, answer = texts(row, template)
            ids = template.encode_prompt(prompt.replace("{question}", question).replace("{answer}", answer))
        prompts += [{"row_id": numbered(row["row_id"], number), "input_ids": ids} for number in range(count)]
    return prompts


def texts(row: Row, template: Template) -> tuple[str, str]:
    """Question and answer of a tokenised row, without the layout around the question."""
    decoded = (
        template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (row["input_ids"][: row["prompt_tokens"]], row["input_ids"][row["prompt_tokens"] : -1])
    )
    question, answer = decoded
    before, between = template.before.strip(), template.between.strip()
    if before and before in question:
        question = question.partition(before)[2]
    if between and between in question:
        question = question.rpartition(between)[0]
    return question.strip(), answer.strip()


def answered(rows: Sequence[Row], drawn: Sequence[Sequence[int]], template: Template) -> list[dict[str, Any]]:
    """The rows' prompts with the samples (all of the first row, then of the second, ...) in place of the answer.

    Samples are decoded and encoded again like any answer: special tokens and surrounding spaces go.
    """
    sampled = [template.tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in drawn]
    answers, count = answer_tokens(sampled, template), len(drawn) // len(rows)
    return [
        {**with_answer(row, answers[at * count + number], template), "row_id": numbered(row["row_id"], number)}
        for at, row in enumerate(rows)
        for number in range(count)
    ]
