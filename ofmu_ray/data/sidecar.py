"""What is known about rows besides their tokens, stored by row id and added to micro-batches when they are collated.

A table of values is a folder with `index.parquet` (row_id, entries: how many the row has), `values.npy` (all entries,
row after row) and `table.json`. A stream's sidecar is a folder with `sidecar.json`, which names its tables and its
refusals (or alternatives, of which a row has several: epoch e takes number e modulo how many there are); the tables
themselves may lie elsewhere, in the cache. Collation adds, in the rows' order:

| quantity | key | shape |
|---|---|---|
| nll | reference_nll | [rows] |
| logits | reference_logprobs | [answer tokens, vocabulary] |
| activations | reference_activations | [answer tokens, width] |
| refusal, alternative | refusal_input_ids, refusal_attention_mask, refusal_labels | int64 [rows, longest] |
| refusal_nll | refusal_reference_nll | [rows] |

Values are memory-mapped: a worker holds the index, and reads the rows that it is at (of a table at a URI, from a copy
that has no name on its machine and goes with it). The answer's tokens include EOS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ofmu_ray.storage import is_file, join, locate, new_mapped, open_mapped, published, read_text, write_text

MARKER = "sidecar.json"
TABLE_MARKER = "table.json"
REFUSAL_NLL = "refusal_reference_nll"
"""Name in a micro-batch of what is known about the text that stands for an answer."""


class Values:
    """A stored table, open for reading."""

    def __init__(self, folder: str) -> None:
        index = read_rows(join(folder, "index.parquet"))
        stops = np.cumsum(index["entries"].to_numpy())
        starts = stops - index["entries"].to_numpy()
        self._places = dict(zip(index["row_id"].to_pylist(), zip(starts, stops, strict=True), strict=True))
        with open_mapped(join(folder, "values.npy")) as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._values: np.ndarray = np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape)

    def rows(self, row_ids: Sequence[str]) -> torch.Tensor:
        """The entries of these rows, one after the other, as stored ([entries] or [entries, ...])."""
        pieces = [self._values[slice(*self._places[row_id])] for row_id in row_ids]
        return torch.from_numpy(np.concatenate(pieces))


class Sidecar:
    """What is known about the rows of one stream."""

    def __init__(self, folder: str) -> None:
        content = json.loads(read_text(join(folder, MARKER)))
        self._tables = {key: Values(path) for key, path in content["tables"].items()}
        refusals = content["refusals"]
        self._refusals = {row["row_id"]: row for row in read_rows(refusals).to_pylist()} if refusals else {}
        self._alternatives: int | None = content.get("alternatives")

    def values(self, row_ids: Sequence[str], epoch: int = 0) -> dict[str, torch.Tensor]:
        """The numbers of these rows, by their names in a micro-batch."""
        texts = self._text_ids(row_ids, epoch)
        return {key: table.rows(texts if key == REFUSAL_NLL else row_ids) for key, table in self._tables.items()}

    def refusals(self, row_ids: Sequence[str], epoch: int = 0) -> list[dict[str, Any]]:
        """The refusals or alternatives to these rows, as rows (input_ids, prompt_tokens); [] when there are none."""
        return [self._refusals[text] for text in self._text_ids(row_ids, epoch)] if self._refusals else []

    def _text_ids(self, row_ids: Sequence[str], epoch: int) -> list[str]:
        if self._alternatives is None:
            return list(row_ids)
        return [alternative_id(row_id, epoch % self._alternatives) for row_id in row_ids]


def alternative_id(row_id: str, number: int) -> str:
    """Under which id a row's alternative of this number (from 0) is stored."""
    return f"{row_id}/{number}"


def open_sidecars(folders: Mapping[str, str] | None) -> dict[str, Sidecar]:
    """Sidecars by stream, from their folders."""
    return {stream: Sidecar(folder) for stream, folder in (folders or {}).items()}


def write_sidecar(folder: str, tables: Mapping[str, str], refusals: str | None, alternatives: int | None = None) -> str:
    """Name the tables (name in a micro-batch -> folder) and the refusals (a Parquet file) of a stream.

    `alternatives`: how many of them each row has, where the file holds alternatives under their own ids.
    """
    filesystem, inside = locate(folder)
    filesystem.create_dir(inside, recursive=True)
    write_text(
        join(folder, MARKER), json.dumps({"tables": dict(tables), "refusals": refusals, "alternatives": alternatives})
    )
    return folder


def has_table(folder: str) -> bool:
    """Whether a complete table lies there."""
    return is_file(join(folder, TABLE_MARKER))


@contextmanager
def new_table(
    folder: str, row_ids: Sequence[str], entries: np.ndarray, shape: Sequence[int], dtype: str, about: Mapping[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A table to fill: (values [sum of entries, *shape], first entry of each row); published when the block ends well.

    `about` goes into `table.json`.
    """
    with published(folder, TABLE_MARKER) as partial:
        with new_mapped(join(partial, "values.npy")) as file:
            full = (int(entries.sum()), *shape)
            described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": full}
            np.lib.format.write_array_header_1_0(file, described)
            file.flush()
            size = int(np.prod(full)) * np.dtype(dtype).itemsize
            os.posix_fallocate(file.fileno(), 0, file.tell() + size)  # a full disk is an error here, a SIGBUS later
            values = np.memmap(file, dtype=np.dtype(dtype), mode="r+", offset=file.tell(), shape=full)
            yield values, np.cumsum(entries) - entries
            values.flush()
        index = pa.table({"row_id": list(row_ids), "entries": entries.astype(np.int64)})
        write_rows(join(partial, "index.parquet"), index)
        write_text(join(partial, TABLE_MARKER), json.dumps(dict(about)))


def write_rows(path: str, table: pa.Table) -> None:
    """Write a Parquet file, making its folder."""
    filesystem, inside = locate(path)
    filesystem.create_dir(inside.rpartition("/")[0], recursive=True)
    pq.write_table(table, inside, filesystem=filesystem)


def read_rows(path: str) -> pa.Table:
    """Read a Parquet file."""
    filesystem, inside = locate(path)
    return pq.read_table(inside, filesystem=filesystem, partitioning=None)
