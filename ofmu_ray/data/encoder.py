"""How the rows of a source become what a model trains on: the one part of the data path that depends on the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from ofmu_ray.data.row_checks import Problems


class EncodedRow(NamedTuple):
    """A row that a model can train on."""

    payload: tuple[Any, ...]
    """Values of the encoder's columns, in their order."""
    length: int
    """Its share of a batch's work (tokens of a text): workers get rows of similar lengths."""
    cut: int
    """How much of it was lost to a limit on length."""
    identity: tuple[str, str]
    """Texts that tell the row from others, for duplicates and overlap."""


class Encoder(Protocol):
    """Picklable, since rows are encoded by tasks on the cluster."""

    payload: pa.Schema
    """Columns that it writes."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of a source's rows that it reads."""

    def fingerprint(self) -> str:
        """Hex digest of all that decides what comes out, its code included."""

    def encode(
        self, rows: Sequence[tuple[str, Mapping[str, Any]]], problems: Problems
    ) -> Iterator[tuple[int, EncodedRow]]:
        """(index, row) of every (place, cells) that can be used; the others are added to `problems`."""


BOOKKEEPING = pa.schema(
    [
        ("length", pa.int32()),
        ("cut", pa.int32()),
        ("exact", pa.binary(16)),
        ("normalised", pa.binary(16)),
    ]
)
"""Columns of an encoded row that only the driver reads."""


def encoded_schema(payload: pa.Schema) -> pa.Schema:
    """Columns of a file of encoded rows."""
    return pa.schema([("row_id", pa.string()), *payload, *BOOKKEEPING])


def payload_columns(names: Sequence[str]) -> list[str]:
    """row_id and the payload among a file's columns: what goes into a batch plan."""
    return [name for name in names if name not in BOOKKEEPING.names]
