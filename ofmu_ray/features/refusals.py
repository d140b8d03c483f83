"""Refusals as answers to forget questions: which one a row gets, and its tokens."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.config import SourceConfig
from ofmu_ray.data import row_checks as checks
from ofmu_ray.data.evaluation_rows import readable
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.data.template import Template
from ofmu_ray.features.protocol import Row
from ofmu_ray.storage import atomic_write

BUILTIN = "builtin:refusals.jsonl"


def read_refusals(path: str | None, root: str | None, option: str) -> list[str]:
    """The refusals of a file with a column `answer` (None: the built-in ones). Raises UserError as `read_texts`."""
    return read_texts(path or BUILTIN, root, option, "answer")


def read_texts(path: str, root: str | None, option: str, column: str) -> list[str]:
    """The texts in a column of a file.

    Raises UserError with every problem of the file; `option` names it.
    """
    source, problems, texts = SourceConfig(path=path), Problems(), []
    for _, place, cells in readable(source, root, column, option, problems):
        if (text := checks.cell(cells, column, None, problems, place)) is not None:
            texts.append(text)
    problems.empty = not texts and not problems.counts
    checks.refuse({option: (source.shown, problems)})
    return texts


def chosen(row_id: str, count: int, seed: int) -> int:
    """Which of `count` refusals a row gets: a hash of seed and row id, so the same in every round."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{row_id}".encode()).digest()[:8], "big") % count


def refusal_rows(rows: Sequence[Row], texts: Sequence[str], template: Template, seed: int) -> list[dict[str, Any]]:
    """The rows' prompts with a refusal and EOS in place of the answer: {row_id, input_ids, prompt_tokens} each.

    `rows`: row_id, input_ids, prompt_tokens.
    """
    answers = answer_tokens(texts, template)
    return [with_answer(row, answers[chosen(row["row_id"], len(texts), seed)], template) for row in rows]


def answer_tokens(texts: Sequence[str], template: Template) -> list[list[int]]:
    """The tokens of answers, without EOS; they do not depend on the question, because the layout ends the prompt."""
    return [row.input_ids[row.prompt_tokens : -1] for row in template.encode_rows(["?"] * len(texts), texts)]


def with_answer(row: Mapping[str, Any], answer: Sequence[int], template: Template) -> dict[str, Any]:
    """The row with these tokens and EOS as its answer; past max_length it is truncated but keeps EOS."""
    prompt = list(row["input_ids"][: row["prompt_tokens"]])
    ids = [*[*prompt, *answer][: template.config.max_length - 1], template.eos]
    return {"row_id": row["row_id"], "input_ids": ids, "prompt_tokens": len(prompt)}


def write_refusals(path: str, rows: Sequence[dict[str, Any]]) -> str:
    """Write refusal rows to a Parquet file; returns `path`. They contain questions: the file is deleted with the run.

    The write is atomic: several trials may write and read the same file.
    """
    schema = pa.schema([("row_id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("prompt_tokens", pa.int32())])
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), content)
    atomic_write(path, content.getvalue())
    return path
