"""What is known about rows besides their tokens, stored by row id and added to micro-batches when they are collated.

A table of values is a folder with `index.parquet` (row_id, entries: how many the row has), `values.npy` (all entries,
row after row) and `table.json`. A stream's sidecar is a folder with `sidecar.json`, which names its tables, what their
values are called in a micro-batch, and the files of other texts than the answers (of which a row may have several:
epoch e takes number e modulo how many there are); tables and texts themselves may lie elsewhere, in the cache. What
there is, and of which shape, the features say (ofmu_ray.features).

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


class StoredValues:
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
        self._tables = {content["keys"][name]: StoredValues(path) for name, path in content["tables"].items()}
        self._texts = {prefix: _Texts(**found) for prefix, found in content["texts"].items()}

    def values(self, row_ids: Sequence[str], epoch: int = 0) -> dict[str, torch.Tensor]:
        """The numbers of these rows, by their names in a micro-batch; those of other texts have the text's prefix."""
        found = {}
        for key, table in self._tables.items():
            text = next((text for prefix, text in self._texts.items() if key.startswith(prefix)), None)
            found[key] = table.rows(row_ids if text is None else text.ids(row_ids, epoch))
        return found

    def texts(self, row_ids: Sequence[str], epoch: int = 0) -> dict[str, list[dict[str, Any]]]:
        """Prefix -> these rows' other texts, as rows (input_ids, prompt_tokens)."""
        return {
            prefix: [text.rows[text_id] for text_id in text.ids(row_ids, epoch)] for prefix, text in self._texts.items()
        }


class _Texts:
    """Other texts than the answers, one or more for each row."""

    def __init__(self, path: str, count: int | None) -> None:
        self.rows = {row["row_id"]: row for row in read_rows(path).to_pylist()}
        self.count = count

    def ids(self, row_ids: Sequence[str], epoch: int) -> list[str]:
        return [numbered(row_id, epoch % self.count) for row_id in row_ids] if self.count else list(row_ids)


def numbered(row_id: str, number: int) -> str:
    """Under which id the text of this number (from 0) of a row is stored."""
    return f"{row_id}/{number}"


def open_sidecars(folders: Mapping[str, str] | None) -> dict[str, Sidecar]:
    """Sidecars by stream, from their folders."""
    return {stream: Sidecar(folder) for stream, folder in (folders or {}).items()}


class SidecarContent:
    """What a sidecar names, to be written."""

    def __init__(self) -> None:
        self.tables: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        self.texts: dict[str, dict[str, Any]] = {}

    def add_table(self, name: str, key: str, folder: str) -> None:
        """A table of values, called `key` in a micro-batch."""
        self.tables[name], self.keys[name] = folder, key

    def add_texts(self, prefix: str, path: str, count: int | None) -> None:
        """A Parquet file of other texts; `count`: how many each row has, under `numbered` ids (None: one)."""
        self.texts[prefix] = {"path": path, "count": count}

    def write(self, folder: str) -> str:
        """Write it; returns `folder`."""
        filesystem, inside = locate(folder)
        filesystem.create_dir(inside, recursive=True)
        write_text(join(folder, MARKER), json.dumps(vars(self)))
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
