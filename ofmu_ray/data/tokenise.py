"""One fragment of a source -> one Parquet file of encoded rows, and a list of problems."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.data.encoder import (
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
_GROUPS = 16


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


def take_rows(folder: str, parts: Sequence[str], rows: np.ndarray, columns: list[str] | None = None) -> pa.Table:
    """Rows with these ascending indices over all parts; only row groups that have some are read.

    `columns`: of the result; None: row_id and the payload.
    """
    pieces, first = [], 0
    for part in parts:
        with _opened(join(folder, part)) as file:
            count = file.metadata.num_rows
            low, high = np.searchsorted(rows, [first, first + count])
            pieces.append(_taken(file, rows[low:high] - first, columns))
        first += count
    return pa.concat_tables(pieces)


def take_part(path: str, rows: np.ndarray, columns: list[str]) -> pa.Table:
    """Rows of one part with these ascending indices, which may repeat."""
    with _opened(path) as file:
        return _taken(file, rows, columns)


def read_part(folder: str, part: str, columns: list[str]) -> pa.Table:
    """Those of these columns that exist, of all rows of a part."""
    with _opened(join(folder, part)) as file:
        return file.read(_existing(file, columns))


def part_columns(path: str) -> list[str]:
    """Names of a part's columns."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    filesystem, inside = locate(path)
    with filesystem.open_input_file(inside) as stream:
        yield pq.ParquetFile(stream)


def _existing(file: pq.ParquetFile, columns: list[str] | None) -> list[str]:
    names: list[str] = file.schema_arrow.names
    return payload_columns(names) if columns is None else [name for name in columns if name in names]


def _taken(file: pq.ParquetFile, rows: np.ndarray, columns: list[str] | None) -> pa.Table:
    meta, names = file.metadata, _existing(file, columns)
    stops = np.cumsum([meta.row_group(number).num_rows for number in range(meta.num_row_groups)], dtype=np.int64)
    which = np.searchsorted(stops, rows, side="right")  # the row group of each row
    groups, starts = np.unique(which, return_index=True)
    pieces = [file.schema_arrow.empty_table().select(names)]
    for at in range(0, len(groups), _GROUPS):  # a few groups in memory at a time
        some = groups[at : at + _GROUPS]
        end = starts[at + _GROUPS] if at + _GROUPS < len(groups) else len(rows)
        sizes = np.diff(stops, prepend=0)[some]
        skipped = stops[some] - np.cumsum(sizes)  # rows before a group that are not read
        mine = slice(starts[at], end)
        local = rows[mine] - skipped[np.searchsorted(some, which[mine])]
        pieces.append(file.read_row_groups(some.tolist(), columns=names).take(pa.array(local)))
    return pa.concat_tables(pieces)
