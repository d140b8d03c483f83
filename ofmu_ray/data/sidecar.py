"""Values of rows besides their tokens, stored by row id and added to micro-batches on collation.

A table of values is a folder with `index.parquet` (row_id, entries: the row's number of entries), `values.npy` (all
entries, row by row) and `table.json`. A stream's sidecar is a folder with `sidecar.json`: its tables, the names of
their values in a micro-batch, and the files of texts other than the answers. A row may have several such texts; epoch e
uses text number e modulo their count. Tables and texts themselves may be elsewhere, in the cache. The features define
their content and shapes (ofmu_ray.features).

Values are memory-mapped: a worker keeps the index in memory and reads rows on demand (for a table at a URI, from an
unnamed local copy that disappears with the process). The answer tokens include EOS.
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
        """The entries of these rows, concatenated, as stored ([entries] or [entries, ...])."""
        pieces = [self._values[slice(*self._places[row_id])] for row_id in row_ids]
        return torch.from_numpy(np.concatenate(pieces))


class Sidecar:
    """The stored values and texts of the rows of one stream."""

    def __init__(self, folder: str) -> None:
        content = json.loads(read_text(join(folder, MARKER)))
        self._tables = {content["keys"][name]: StoredValues(path) for name, path in content["tables"].items()}
        self._texts = {prefix: _Texts(**entry) for prefix, entry in content["texts"].items()}

    def values(self, row_ids: Sequence[str], epoch: int = 0) -> dict[str, torch.Tensor]:
        """The values of these rows by their names in a micro-batch; values of other texts have the text's prefix."""
        values = {}
        for key, table in self._tables.items():
            text = next((text for prefix, text in self._texts.items() if key.startswith(prefix)), None)
            values[key] = table.rows(row_ids if text is None else text.ids(row_ids, epoch))
        return values

    def texts(self, row_ids: Sequence[str], epoch: int = 0) -> dict[str, list[dict[str, Any]]]:
        """Prefix -> the other texts of these rows, as rows (input_ids, prompt_tokens)."""
        return {
            prefix: [text.rows[text_id] for text_id in text.ids(row_ids, epoch)] for prefix, text in self._texts.items()
        }


class _Texts:
    """Texts other than the answers, one or more per row."""

    def __init__(self, path: str, count: int | None) -> None:
        self.rows = {row["row_id"]: row for row in read_rows(path).to_pylist()}
        self.count = count

    def ids(self, row_ids: Sequence[str], epoch: int) -> list[str]:
        return [numbered(row_id, epoch % self.count) for row_id in row_ids] if self.count else list(row_ids)


def numbered(row_id: str, number: int) -> str:
    """The id under which a row's text with this number (from 0) is stored."""
    return f"{row_id}/{number}"


def open_sidecars(folders: Mapping[str, str] | None) -> dict[str, Sidecar]:
    """Sidecars by stream, from their folders."""
    return {stream: Sidecar(folder) for stream, folder in (folders or {}).items()}


def parameter_files(folders: Mapping[str, str] | None) -> dict[str, str]:
    """Name -> file of the tensors by parameter in sidecars (stream -> folder)."""
    files: dict[str, str] = {}
    for folder in (folders or {}).values():
        files |= json.loads(read_text(join(folder, MARKER))).get("parameters", {})
    return files


class SidecarContent:
    """The content of a sidecar to be written."""

    def __init__(self) -> None:
        self.tables: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        self.texts: dict[str, dict[str, Any]] = {}
        self.parameters: dict[str, str] = {}
        """Name -> safetensors file of tensors shaped like the model's parameters."""

    def add_table(self, name: str, key: str, folder: str) -> None:
        """Add a table of values, called `key` in a micro-batch."""
        self.tables[name], self.keys[name] = folder, key

    def add_texts(self, prefix: str, path: str, count: int | None) -> None:
        """Add a Parquet file of other texts; `count`: how many each row has, under `numbered` ids (None: one)."""
        self.texts[prefix] = {"path": path, "count": count}

    def write(self, folder: str) -> str:
        """Write it; returns `folder`."""
        filesystem, inside = locate(folder)
        filesystem.create_dir(inside, recursive=True)
        write_text(join(folder, MARKER), json.dumps(vars(self)))
        return folder


def has_table(folder: str) -> bool:
    """Whether the folder contains a complete table."""
    return is_file(join(folder, TABLE_MARKER))


@contextmanager
def new_table(
    folder: str, row_ids: Sequence[str], entries: np.ndarray, shape: Sequence[int], dtype: str, about: Mapping[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A table to fill: (values [sum of entries, *shape], first entry of each row); published if the block succeeds.

    `about` goes into `table.json`.
    """
    with published(folder, TABLE_MARKER) as partial:
        with new_mapped(join(partial, "values.npy")) as file:
            full = (int(entries.sum()), *shape)
            described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": full}
            np.lib.format.write_array_header_1_0(file, described)
            file.flush()
            size = int(np.prod(full)) * np.dtype(dtype).itemsize
            os.posix_fallocate(file.fileno(), 0, file.tell() + size)  # a full disk is an error here, but a SIGBUS later
            values = np.memmap(file, dtype=np.dtype(dtype), mode="r+", offset=file.tell(), shape=full)
            yield values, np.cumsum(entries) - entries
            values.flush()
        index = pa.table({"row_id": list(row_ids), "entries": entries.astype(np.int64)})
        write_rows(join(partial, "index.parquet"), index)
        write_text(join(partial, TABLE_MARKER), json.dumps(dict(about)))


def write_rows(path: str, table: pa.Table) -> None:
    """Write a Parquet file; creates its folder."""
    filesystem, inside = locate(path)
    filesystem.create_dir(inside.rpartition("/")[0], recursive=True)
    pq.write_table(table, inside, filesystem=filesystem)


def read_rows(path: str) -> pa.Table:
    """Read a Parquet file."""
    filesystem, inside = locate(path)
    return pq.read_table(inside, filesystem=filesystem, partitioning=None)
