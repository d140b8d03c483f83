"""One fragment of a source -> one Parquet file of encoded rows, and a list of problems."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.data.encoder import (
    BOOKKEEPING,
    EncodedRow,
    Encoder,
    Piece,
    encoded_schema,
    payload_columns,
    stream_encoder,
)
from ofmu_ray.data.row_checks import Problems, digests, of_piece
from ofmu_ray.data.sources import Fragment, UnreadableRow, read
from ofmu_ray.storage import join, locate

BATCH_ROWS = 1024
DIGEST = 16
"""Bytes."""


@dataclass(frozen=True)
class PartJob:
    """A fragment and the file for its tokens."""

    fragment: Fragment
    target: str


@dataclass
class Part:
    """The content of a part file, and the refused rows."""

    stream: str
    name: str
    rows: int = 0
    rows_read: int = 0
    """Rows read, including refused ones."""
    problems: Problems = field(default_factory=Problems)


def encode_fragment(job: PartJob, encoder: Encoder) -> Part:
    """Read, check, encode and write one fragment; memory holds one batch of rows at a time."""
    part = Part(job.fragment.stream, job.target.partition("?")[0].rpartition("/")[2])
    filesystem, path = locate(job.target)
    schema = encoded_schema(encoder.payload)
    encoder = stream_encoder(encoder, job.fragment.stream)
    rows = read(job.fragment, list(encoder.columns))
    with pq.ParquetWriter(path, schema, filesystem=filesystem) as writer:
        while chunk := list(itertools.islice(rows, BATCH_ROWS)):
            part.rows_read += len(chunk)
            table = _table(job.fragment, chunk, encoder, part.problems, schema)
            part.rows += table.num_rows
            writer.write_table(table)
    return part


def _table(fragment: Fragment, chunk: list[Any], encoder: Encoder, problems: Problems, schema: pa.Schema) -> pa.Table:
    readable = []
    for number, row in chunk:
        if isinstance(row, UnreadableRow):
            problems.add(row.kind, _place(fragment, number))
        else:
            readable.append((number, row))
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    placed = [(_place(fragment, number), row) for number, row in readable]
    for index, row in encoder.encode(placed, problems):
        row_id = fragment.row_id(readable[index][0])
        if row.piece is not None:
            row_id += f".{row.piece}"
        values = (row_id, *row.payload, row.length, row.cut, *_digests(row))
        for name, value in zip(schema.names, values, strict=True):
            columns[name].append(value)
    return pa.table(columns, schema=schema)


def _digests(row: EncodedRow) -> tuple[bytes, bytes]:
    """The exact and the normalised digests of all texts in a row, 16 bytes each."""
    pieces = [Piece(row.identity, row.piece or 1), *row.others]
    pairs = [tuple(of_piece(digest, number) for digest in digests(*identity)) for identity, number in pieces]
    exact, normalised = (b"".join(each) for each in zip(*pairs, strict=True))
    return exact, normalised


def _place(fragment: Fragment, number: int) -> str:
    return f"{fragment.name.rpartition('/')[2]} row {number}"


@dataclass(frozen=True)
class Columns:
    """What the driver needs of an encoded stream: a few dozen bytes per row, no payload."""

    lengths: np.ndarray
    """int32 [rows], tokens of each row."""
    prompt_tokens: np.ndarray
    """int32 [rows], how many of them have no loss; 0 if the task has no prompts."""
    cut: np.ndarray
    """int32 [rows], tokens lost to max_length."""
    exact: np.ndarray
    """S16 [texts]."""
    normalised: np.ndarray
    """S16 [texts]."""
    row: np.ndarray
    """int64 [texts], the row of each text; a row holds several if documents are packed."""

    def any(self, texts: np.ndarray) -> np.ndarray:
        """bool [rows]: whether any of a row's texts is marked in `texts`, bool [texts]."""
        return np.bincount(self.row[texts], minlength=len(self.lengths)) > 0


def load_columns(folder: str, parts: list[str]) -> Columns:
    """Lengths and digests of all rows, in order."""
    table = pa.concat_tables([_read(folder, part, [*BOOKKEEPING.names, "prompt_tokens"]) for part in parts])
    lengths, cut = (table[name].to_numpy() for name in ("length", "cut"))
    prompts = table["prompt_tokens"].to_numpy() if "prompt_tokens" in table.column_names else np.zeros_like(lengths)
    exact, normalised = (table[name].to_pylist() for name in ("exact", "normalised"))
    texts = np.array([len(each) // DIGEST for each in exact], dtype=np.int64)
    exact, normalised = (np.frombuffer(b"".join(each), dtype=f"S{DIGEST}") for each in (exact, normalised))
    return Columns(lengths, prompts, cut, exact, normalised, np.repeat(np.arange(len(texts)), texts))


def take_rows(folder: str, parts: list[str], rows: np.ndarray, columns: list[str] | None = None) -> pa.Table:
    """Rows with these ascending indices over all parts, one part in memory at a time.

    `columns`: of the result; None: row_id and the payload.
    """
    pieces, first = [], 0
    for part in parts:
        table = _read(folder, part, columns)
        low, high = np.searchsorted(rows, [first, first + table.num_rows])
        pieces.append(table.take(pa.array(rows[low:high] - first)))
        first += table.num_rows
    return pa.concat_tables(pieces)


def _read(folder: str, part: str, columns: list[str] | None) -> pa.Table:
    """Those of these columns that exist."""
    filesystem, path = locate(join(folder, part))
    with filesystem.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        names = payload_columns(file.schema_arrow.names)
        if columns is not None:
            names = [name for name in columns if name in file.schema_arrow.names]
        return file.read(names)
