"""One fragment of a source -> one Parquet file of tokens, with what was wrong on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.data.row_checks import Problems, digests, pair
from ofmu_ray.data.sources import Broken, Fragment, read
from ofmu_ray.data.template import Template
from ofmu_ray.storage import join, locate

BATCH_ROWS = 1024

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("length", pa.int32()),
        ("cut", pa.int32()),  # tokens lost to max_length
        ("exact", pa.binary(16)),
        ("normalised", pa.binary(16)),
    ]
)


@dataclass(frozen=True)
class PartJob:
    """A fragment and the file that its tokens go to."""

    fragment: Fragment
    target: str


@dataclass
class Part:
    """What a part file holds, and the rows that could not go in."""

    stream: str
    name: str
    rows: int = 0
    seen: int = 0
    """Rows read, with the refused ones."""
    problems: Problems = field(default_factory=Problems)


def tokenise(job: PartJob, template: Template) -> Part:
    """Read, check, tokenise and write one fragment; memory holds one batch of rows at a time."""
    part = Part(job.fragment.stream, job.target.partition("?")[0].rpartition("/")[2])
    filesystem, path = locate(job.target)
    columns = [template.config.question, template.config.answer]
    rows = read(job.fragment, columns)
    with pq.ParquetWriter(path, SCHEMA, filesystem=filesystem) as writer:
        while chunk := list(itertools.islice(rows, BATCH_ROWS)):
            part.seen += len(chunk)
            table = _table(job.fragment, chunk, template, part.problems)
            part.rows += table.num_rows
            writer.write_table(table)
    return part


def _table(fragment: Fragment, chunk: list[Any], template: Template, problems: Problems) -> pa.Table:
    good = list(_good(fragment, chunk, template, problems))
    encoded = template.encode_rows([q for _, q, _ in good], [a for _, _, a in good])
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for (number, question, answer), row in zip(good, encoded, strict=True):
        if row.only_prompt:
            limit = f"data.format.max_length = {template.config.max_length}"
            problems.add(f"only prompt is left within {limit}; raise it or drop these rows", _place(fragment, number))
            continue
        exact, normalised = digests(question, answer)
        values = (
            fragment.row_id(number),
            row.input_ids,
            row.prompt_tokens,
            len(row.input_ids),
            row.cut,
            exact,
            normalised,
        )
        for name, value in zip(SCHEMA.names, values, strict=True):
            columns[name].append(value)
    return pa.table(columns, schema=SCHEMA)


def _good(
    fragment: Fragment, chunk: list[Any], template: Template, problems: Problems
) -> Iterator[tuple[int, str, str]]:
    for number, row in chunk:
        place = _place(fragment, number)
        if isinstance(row, Broken):
            problems.add(row.kind, place)
        elif texts := pair(row, template.config, problems, place):
            yield number, *texts


def _place(fragment: Fragment, number: int) -> str:
    return f"{fragment.name.rpartition('/')[2]} row {number}"


@dataclass(frozen=True)
class Columns:
    """The columns of a tokenised stream that the driver looks at: a few dozen bytes a row, no tokens."""

    lengths: np.ndarray
    """int32 [rows], tokens of each row."""
    prompt_tokens: np.ndarray
    """int32 [rows]."""
    cut: np.ndarray
    """int32 [rows], tokens lost to max_length."""
    exact: np.ndarray
    """S16 [rows]."""
    normalised: np.ndarray
    """S16 [rows]."""


def load_columns(folder: str, parts: list[str]) -> Columns:
    """Lengths and digests of all rows, in order."""
    names = ["length", "prompt_tokens", "cut", "exact", "normalised"]
    table = pa.concat_tables([_read(folder, part, names) for part in parts])
    numbers = [table[name].to_numpy() for name in names[:3]]
    return Columns(*numbers, *(_digest_array(table[name]) for name in names[3:]))


def take_rows(folder: str, parts: list[str], rows: np.ndarray, columns: list[str]) -> pa.Table:
    """Columns of the rows with these ascending indices over all parts; one part in memory at a time."""
    found, first = [], 0
    for part in parts:
        table = _read(folder, part, columns)
        low, high = np.searchsorted(rows, [first, first + table.num_rows])
        found.append(table.take(pa.array(rows[low:high] - first)))
        first += table.num_rows
    return pa.concat_tables(found)


def _read(folder: str, part: str, columns: list[str]) -> pa.Table:
    filesystem, path = locate(join(folder, part))
    return pq.read_table(path, columns=columns, filesystem=filesystem)


def _digest_array(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), dtype="S16")
