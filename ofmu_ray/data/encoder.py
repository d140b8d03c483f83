"""Encode rows of a source for training: the only part of the data path that depends on the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from ofmu_ray.data.row_checks import Problems


class Piece(NamedTuple):
    """A part of a text: the window of a document, the turn of a chat."""

    identity: tuple[str, str]
    """Texts that identify the whole."""
    number: int
    """Of the part, from 1."""


class EncodedRow(NamedTuple):
    """A row ready for training."""

    payload: tuple[Any, ...]
    """Values of the encoder's columns, in their order."""
    length: int
    """Its share of a batch's work (the tokens of a text): workers get rows of similar lengths."""
    cut: int
    """How much was truncated."""
    identity: tuple[str, str]
    """Texts that identify the row, for duplicates and overlap."""
    piece: int | None = None
    """If a row of the source becomes several: the number of this one, from 1."""
    others: tuple[Piece, ...] = ()
    """What else is in the row, if it holds parts of several texts."""


class Encoder(Protocol):
    """Picklable, because tasks on the cluster encode the rows."""

    payload: pa.Schema
    """Columns that it writes."""
    # optional: task: str, the task whose models give features of these rows; else causal_lm

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the source that it reads."""

    def fingerprint(self) -> str:
        """Hex digest of everything that determines the output, including its code."""

    def encode(
        self, rows: Sequence[tuple[str, Mapping[str, Any]]], problems: Problems
    ) -> Iterator[tuple[int, EncodedRow]]:
        """(index, row) of every usable (place, cells); the others are added to `problems`."""

    # optional: def stream(self, name: str) -> Encoder
    # the encoder of one stream, where they differ


def stream_encoder(encoder: Encoder, name: str) -> Encoder:
    """The encoder of a stream."""
    of = getattr(encoder, "stream", None)
    return encoder if of is None else of(name)


BOOKKEEPING = pa.schema(
    [
        ("length", pa.int32()),
        ("cut", pa.int32()),
        ("exact", pa.binary()),
        ("normalised", pa.binary()),
    ]
)
"""Columns of an encoded row that only the driver reads. The digests are of 16 bytes each, one for every text in it."""


def encoded_schema(payload: pa.Schema) -> pa.Schema:
    """Columns of a file of encoded rows."""
    return pa.schema([("row_id", pa.string()), *payload, *BOOKKEEPING])


STORED = ("image_pixels",)
"""Payload columns that a batch plan does not repeat: its readers look them up by row id."""


def plan_columns(names: Sequence[str]) -> list[str]:
    """row_id and the payload columns of a file that a batch plan holds."""
    return [name for name in payload_columns(names) if name not in STORED]


def payload_columns(names: Sequence[str]) -> list[str]:
    """row_id and the payload columns of a file."""
    return [name for name in names if name not in BOOKKEEPING.names]
