"""Rows of a question and an answer as token ids: the encoder of causal language models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import pyarrow as pa

from ofmu_ray.config import FormatConfig
from ofmu_ray.data.encoder import EncodedRow
from ofmu_ray.data.row_checks import Problems, pair
from ofmu_ray.data.template import AnswerTokens, Template

_CODE = ("answer_encoder.py", "template.py")


class AnswerEncoder:
    """Encodes `input_ids` (prompt, answer, EOS) and `prompt_tokens`, the number of leading tokens without a loss.

    Raises:
        UserError: as `Template`.
    """

    payload = pa.schema([("input_ids", pa.list_(pa.int32())), ("prompt_tokens", pa.int32())])

    def __init__(self, tokenizer: Any, config: FormatConfig) -> None:
        self.template = Template(tokenizer, config)

    @property
    def columns(self) -> tuple[str, str]:
        return self.template.config.question, self.template.config.answer

    def fingerprint(self) -> str:
        code = [files("ofmu_ray.data").joinpath(name).read_text() for name in _CODE]
        return hashlib.sha256("".join([self.template.fingerprint(), *code]).encode()).hexdigest()

    def encode(
        self, rows: Sequence[tuple[str, Mapping[str, Any]]], problems: Problems
    ) -> Iterator[tuple[int, EncodedRow]]:
        config = self.template.config
        good = [
            (index, place, texts)
            for index, (place, cells) in enumerate(rows)
            if (texts := pair(cells, config, problems, place))
        ]
        encoded = self.template.encode_rows([texts[0] for _, _, texts in good], [texts[1] for _, _, texts in good])
        for (index, place, texts), row in zip(good, encoded, strict=True):
            for done in encoded_rows(row, texts, config, problems, place):
                yield index, done


def encoded_rows(
    row: AnswerTokens, identity: tuple[str, str], config: FormatConfig, problems: Problems, place: str
) -> Iterator[EncodedRow]:
    """The row, unless it is only prompt, which is added to `problems`."""
    if row.only_prompt:
        limit = f"data.format.max_length = {config.max_length}"
        problems.add(f"only the prompt fits within {limit}; raise it or drop these rows", place)
    else:
        yield EncodedRow((row.input_ids, row.prompt_tokens), len(row.input_ids), row.cut, identity)
