"""The encoder of each stream, by what its rows are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ofmu_ray.config import FormatConfig
from ofmu_ray.config.data import Kind
from ofmu_ray.data.answer_encoder import AnswerEncoder
from ofmu_ray.data.chat_encoder import ChatEncoder
from ofmu_ray.data.encoder import EncodedRow, Encoder
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.data.template import Template
from ofmu_ray.data.text_encoder import TextEncoder


def encoder_of(kind: Kind, template: Template, config: FormatConfig) -> Encoder:
    """The encoder of one kind of rows. Raises UserError: the tokenizer does not fit it."""
    if kind == "qa":
        return AnswerEncoder(template.tokenizer, config)
    return (TextEncoder if kind == "text" else ChatEncoder)(template, config)


@dataclass(frozen=True)
class StreamEncoders:
    """An encoder per stream; the streams' rows have the same payload."""

    template: Template
    by_stream: Mapping[str, Encoder]
    payload = AnswerEncoder.payload

    @classmethod
    def of(cls, tokenizer: Any, config: FormatConfig, kinds: Mapping[str, Kind]) -> StreamEncoders:
        """Raises UserError: the tokenizer does not fit a kind."""
        template = Template(tokenizer, config)
        encoders = {kind: encoder_of(kind, template, config) for kind in dict.fromkeys(kinds.values())}
        return cls(template, {stream: encoders[kind] for stream, kind in kinds.items()})

    @property
    def columns(self) -> Sequence[str]:
        return list(dict.fromkeys(name for encoder in self.by_stream.values() for name in encoder.columns))

    def fingerprint(self) -> str:
        prints = {stream: encoder.fingerprint() for stream, encoder in self.by_stream.items()}
        return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()

    def stream(self, name: str) -> Encoder:
        """The encoder of a stream."""
        return self.by_stream[name]

    def encode(
        self, rows: Sequence[tuple[str, Mapping[str, Any]]], problems: Problems
    ) -> Iterator[tuple[int, EncodedRow]]:
        raise AssertionError("rows are encoded by stream")
