"""Split sources into fragments: pieces of a data set that one task reads independently.

A file of CSV, TSV or plain text is one fragment, a local one of JSON Lines one per range of bytes, a Parquet file one
per row group, a data set of the hub or of `save_to_disk` one per slice. A fragment knows the number of its first row,
so row ids do not depend on who reads what. It names where its rows are and does not contain them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from ofmu_ray.config import PartConfig, SourceConfig
from ofmu_ray.data import image_files
from ofmu_ray.data.content import content
from ofmu_ray.data.hub_sets import hub_set, saved_set
from ofmu_ray.data.row_files import PACKED, ROW_FILES, UnreadableRow, read_file, row_file, starts_array
from ofmu_ray.errors import UserError
from ofmu_ray.storage import is_uri, join, locate, without_credentials
from ofmu_ray.storage.trouble import refusal

__all__ = ["Fragment", "UnreadableRow", "fingerprint", "fragments", "read"]

PARQUET_SUFFIXES = (".parquet", ".pq")
SUFFIXES = (*(suffix for suffixes in ROW_FILES.values() for suffix in suffixes), *PARQUET_SUFFIXES)
ON_DISK = ("dataset_info.json", "dataset_dict.json")
"""A folder with one of these is a data set that `datasets` saved (`save_to_disk`)."""
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+)(?::([\w.%:\[\]-]+))?", re.ASCII)
"""A hub data set with its configuration, and perhaps its split: owner/name:configuration:split."""
SLICE_ROWS = 20_000
"""Rows of a fragment of a hub data set."""
BATCH_ROWS = 1024
"""Rows read together."""


Rows = Iterator[tuple[int, dict[str, Any] | UnreadableRow]]
"""(row number from 1, row)."""


@dataclass(frozen=True)
class Fragment:
    """One task's worth of rows of a source."""

    stream: str
    kind: str
    """json, csv, tsv, text, parquet, images, or table: rows in memory."""
    path: str
    """Local path or URI of the file; for a data set, its name or folder."""
    file: int | None = None
    """Number of the file in its source (from 1); None if the source is one file."""
    first_row: int = 1
    """Number of the fragment's first row in its file (from 1)."""
    span: tuple[int, int] | None = None
    """First byte, and the one after the last, of a range of JSON Lines."""
    row_group: int | None = None
    size: int | None = None
    """Number of its rows, where that is known without reading them."""
    rows: int | None = None
    """Read at most this many rows."""
    table: Any = None
    """A pyarrow table, or a data set of `datasets` whose `size` rows from `first_row` on these are."""
    files: tuple[tuple[str, str], ...] = ()
    """Of `images`: (path, class) of each row."""
    part: PartConfig | None = None
    """Read only the rows of this part of the source."""
    identity: str = ""
    """What the content hash covers: sha256 of the bytes, or size and modification time on an object store."""

    def row_id(self, row: int) -> str:
        """Stable name of a row, without any of its text."""
        return f"{self.stream}-{row}" if self.file is None else f"{self.stream}-{self.file}-{row}"

    @property
    def name(self) -> str:
        return without_credentials(self.path)


def fragments(source: SourceConfig, root: str | None, *, stream: str, option: str) -> list[Fragment]:
    """All fragments of a source, in a stable order. `option` names the source in errors (e.g. data.forget).

    Raises UserError: no path, no such file, an unknown suffix, no connection to the hub.
    """
    if not source.paths:
        raise UserError(f"{option}.path is not set: give a file, folder, glob, URI or hub data set")
    source = _named(source)
    if source.format == "images" or (source.path or "") in image_files.DIGITS:
        pieces = _image_fragments(source, root, stream, option)
    elif _is_hub(source, root):
        pieces = _slices(hub_set(source, option), str(source.path), stream)
    elif (folder := _saved_folder(source, root)) is not None:
        pieces = _slices(saved_set(folder, source, option), folder, stream)
    else:
        paths = [file for path in source.paths for file in _expand(_under(root, _builtin(path)), option)]
        numbers: list[int | None] = [None] if len(paths) == 1 else list(range(1, len(paths) + 1))
        pairs = zip(paths, numbers, strict=True)
        pieces = [piece for path, number in pairs for piece in _file_fragments(path, number, source, stream, option)]
    if not pieces:
        raise UserError(f"{option}.path = {source.shown}: no rows")
    pieces = pieces if source.limit is None else list(_limited(pieces, source.limit))
    return [replace(piece, part=source) for piece in pieces] if isinstance(source, PartConfig) else pieces


def read(fragment: Fragment, columns: Collection[str] | None = None, *, some: bool = False) -> Rows:
    """(row number from 1, row) of each row; a row that cannot be read is an `UnreadableRow`.

    `columns`: those to read of Parquet files and data sets. If one is missing, all are read, to show the user which
    there are; with `some`, those that are missing are not needed, and those that are not read are null. The column that
    tells a part's rows is read, too.
    """
    part = fragment.part
    by_class = part is not None and part.split.share is None
    if part is not None and by_class and columns is not None:
        columns = {*columns, part.label}
    if fragment.kind == "images":
        rows: Rows = image_files.read(fragment.files, fragment.first_row)
    elif fragment.kind in ROW_FILES:
        rows = read_file(fragment.kind, fragment.path, fragment.span, fragment.first_row)
    else:
        rows = _read_table(fragment, columns, some)
    rows = rows if fragment.rows is None else itertools.islice(rows, fragment.rows)
    if part is None:
        return rows
    if by_class:
        rows = _classed(rows, part.label)
    return (row for row in rows if in_part(part, row[1], f"{fragment.file}/{row[0]}"))


def _classed(rows: Rows, label: str) -> Rows:
    """The rows; one without its class is refused, or it would silently be a row to keep."""
    for number, row in rows:
        if isinstance(row, dict) and label not in row:
            known = ", ".join(sorted(map(str, row)))
            row = UnreadableRow(f"no column {label!r} for data.split, only {known}. Set --data.images.label")
        elif isinstance(row, dict) and row[label] is None:
            row = UnreadableRow(f"null in column {label!r}, which data.split needs")
        yield number, row


def in_part(part: PartConfig, row: dict[str, Any] | UnreadableRow, place: str) -> bool:
    """Whether a row belongs to a part: by its class, or by a hash of the seed and its place, about `share` of all.

    A row that cannot be read belongs to both, so that it is refused.
    """
    if isinstance(row, UnreadableRow):
        return True
    split = part.split
    if split.share is not None:
        digest = hashlib.blake2b(f"{split.seed}/{place}".encode(), digest_size=8).digest()
        forgotten = int.from_bytes(digest, "big") < split.share * 2**64
    else:
        label = row[part.label]
        forgotten = label in split.classes or str(label) in map(str, split.classes)
    return forgotten == part.forgotten


def fingerprint(pieces: list[Fragment]) -> str:
    """Hex digest of the fragments' content, first row numbers and row limits."""
    whole = [f for f in pieces if f.span is None or f.span[0] == 0 or f.rows is not None]  # a file is hashed as a whole
    content: list[list[Any]] = [[f.kind, f.file, f.first_row, f.row_group, f.rows, f.identity] for f in whole]
    for entry, piece in zip(content, whole, strict=True):
        entry += [] if piece.part is None else [asdict(piece.part.split), piece.part.forgotten]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ finding


def _image_fragments(source: SourceConfig, root: str | None, stream: str, option: str) -> list[Fragment]:
    if source.path in image_files.DIGITS:
        table = image_files.digits(str(source.path))
        return [Fragment(stream, "table", str(source.path), table=table, identity=f"scikit-learn {source.path}")]
    [path] = source.paths if len(source.paths) == 1 else [""]
    pieces = image_files.found(_under(root, path), f"{option}.path")
    starts = itertools.accumulate((len(piece) for piece, _ in pieces), initial=1)
    return [
        Fragment(stream, "images", path, first_row=start, files=piece, identity=identity)
        for start, (piece, identity) in zip(starts, pieces, strict=False)
    ]


def _builtin(path: str) -> str:
    if not path.startswith("builtin:"):
        return path
    from ofmu_ray.assets import resolve_builtin

    return str(resolve_builtin(path))


def _under(root: str | None, path: str) -> str:
    """The user's data path, relative to `data.root`; URIs and absolute paths are unchanged."""
    if root is None or "://" in path or os.path.isabs(path):
        return path
    return join(root, path)


def _saved_folder(source: SourceConfig, root: str | None) -> str | None:
    """The folder of a data set that `datasets` saved; None: it is something else."""
    if not isinstance(source.path, str):
        return None
    folder = _under(root, _builtin(source.path))
    return folder if any(os.path.isfile(os.path.join(folder, name)) for name in ON_DISK) else None


def _named(source: SourceConfig) -> SourceConfig:
    """The source with the configuration and split that its path may name (owner/name:configuration:split)."""
    named = HUB_NAME.fullmatch(source.path) if isinstance(source.path, str) else None
    if named is None or source.format not in ("auto", "hub") or os.path.exists(str(source.path)):
        return source
    name, config, split = named.groups()
    return replace(source, path=name, format="hub", hub_config=config, hub_split=split or source.hub_split)


def _is_hub(source: SourceConfig, root: str | None) -> bool:
    path = source.path or ""
    if isinstance(path, list):
        return False
    if source.format != "auto":
        return source.format == "hub"
    plain = not (is_uri(path) or path.startswith(("builtin:", ".", "~")) or os.path.isabs(path) or "*" in path)
    known = path.endswith(SUFFIXES)
    return plain and not known and root is None and path.count("/") == 1 and not os.path.exists(path)


def _expand(path: str, option: str) -> list[str]:
    """Files of a file, folder or glob, sorted by path."""
    filesystem, inside = locate(path, f"{option}.path")
    try:
        kind = filesystem.get_file_info(inside).type
        if kind == pafs.FileType.Directory:
            files = [p for p in _walk(filesystem, inside) if p.endswith(SUFFIXES)]
        elif kind == pafs.FileType.File:  # also one whose name looks like a glob: rows [1].jsonl
            files = [inside]
        elif any(mark in inside for mark in "*["):
            base = inside[: min(inside.find(mark) for mark in "*[" if mark in inside)].rpartition("/")[0]
            files = [p for p in _walk(filesystem, base) if fnmatch.fnmatch(p, inside)]
        else:
            files = []
    except OSError as error:
        shown = without_credentials(path)
        reason = refusal(error) or f"cannot be read ({type(error).__name__})"
        raise UserError(f"{option}.path = {shown}: {reason}") from None
    if not files:
        raise UserError(
            f"{option}.path = {without_credentials(path)}: no such file; give a file of JSON, Parquet, CSV or "
            "text, a folder or glob of them, an s3:// or gs:// URI, or a hub data set with --" + option + ".format hub"
        )
    return [_full(path, inside, p) for p in sorted(files)]


def _walk(filesystem: pafs.FileSystem, folder: str) -> list[str]:
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    files = [info.path for info in infos if info.type == pafs.FileType.File]
    return [path for path in files if not image_files.hidden(path, folder, (".", "_"))]


def _full(original: str, inside: str, path: str) -> str:
    """`path` in the file system of the URI `original` (whose own path is `inside`), as a URI."""
    if not is_uri(original):
        return path
    stem, mark, query = original.partition("?")
    head = stem[: len(stem.rstrip("/")) - len(inside.rstrip("/"))]
    return head + path + mark + query


def _file_fragments(
    path: str, number: int | None, source: SourceConfig, stream: str, option: str
) -> Iterator[Fragment]:
    plain = without_credentials(path)
    kind: str = source.format
    if kind == "auto":
        kind = "parquet" if plain.endswith(PARQUET_SUFFIXES) else row_file(plain) or "auto"
    if kind == "auto":
        choices = ", ".join([*ROW_FILES, "parquet"])
        raise UserError(f"{option}.path = {plain}: unknown suffix; set --{option}.format to one of {choices}")
    filesystem, inside = locate(path, f"{option}.path")
    read = content(inside) if isinstance(filesystem, pafs.LocalFileSystem) else None
    identity = _remote_identity(path) if read is None else read.sha256
    if kind in ROW_FILES:
        split = read is not None and kind == "json" and not plain.endswith(PACKED) and not starts_array(path)
        starts = read.ranges if read is not None and split else ((0, 1),)
        stops = [*(start for start, _ in starts[1:]), None]
        for (start, line), stop in zip(starts, stops, strict=True):
            span = None if len(starts) == 1 else (start, stop or os.path.getsize(inside))
            yield Fragment(stream, kind, path, number, line, span, identity=identity)
        return
    try:
        groups = pq.ParquetFile(inside, filesystem=filesystem).metadata
    except (pa.ArrowInvalid, OSError):
        raise UserError(f"{option}.path = {plain}: not a Parquet file; set --{option}.format json") from None
    first = 1
    for group in range(groups.num_row_groups):
        size = groups.row_group(group).num_rows
        yield Fragment(stream, "parquet", path, number, first, row_group=group, size=size, identity=identity)
        first += size


def _remote_identity(path: str) -> str:
    filesystem, inside = locate(path)
    info = filesystem.get_file_info(inside)  # reading everything twice from an object store is too expensive
    return f"{without_credentials(path)}:{info.size}:{info.mtime_ns}"


def _slices(data: Any, name: str, stream: str) -> list[Fragment]:
    """Fragments of a data set of `datasets`, which travels as the names of its files if it has any.

    Other nodes may not have them, so on several nodes the rows travel.
    """
    from ofmu_ray.cluster.map_tasks import running_ray
    from ofmu_ray.cluster.nodes import alive
    from ofmu_ray.internals.datasets_private import fingerprint

    shared = running_ray() is None or len(alive()) == 1
    count, identity = len(data), fingerprint(data)
    data = data.with_format("arrow")
    pieces = []
    for start in range(0, max(count, 1), SLICE_ROWS):
        size = min(SLICE_ROWS, count - start)
        table = data if shared else data[start : start + size]
        pieces.append(Fragment(stream, "table", name, None, start + 1, size=size, table=table, identity=identity))
    return pieces


def _limited(pieces: list[Fragment], limit: int) -> Iterator[Fragment]:
    """The fragments with the first `limit` rows."""
    left = limit
    for piece in pieces:
        if left <= 0:
            return
        known = piece.size is not None
        count = min(left, piece.size or 0) if known else sum(1 for _ in read(replace(piece, rows=left)))
        yield replace(piece, rows=count)
        left -= count


# ------------------------------------------------------------------------------------------------------ reading


def _read_table(fragment: Fragment, columns: Collection[str] | None, some: bool) -> Rows:
    batches, names = _batches(fragment, set(columns or ()), some)
    number = fragment.first_row
    for batch in batches:
        unread = dict.fromkeys(name for name in names if name not in batch.schema.names)
        for row in batch.to_pylist():
            yield number, {**row, **unread}
            number += 1


def _batches(fragment: Fragment, wanted: set[str], some: bool) -> tuple[Iterator[pa.RecordBatch], list[str]]:
    """The fragment's rows, those of `wanted` that it has, and the names of all its columns."""
    table, file = fragment.table, None
    if table is None:
        filesystem, path = locate(fragment.path)
        file = pq.ParquetFile(path, filesystem=filesystem)
        names: list[str] = file.schema_arrow.names
    else:
        names = table.column_names
    found = [name for name in names if name in wanted]
    chosen = found if found and (some or len(found) == len(wanted)) else names
    most = min(BATCH_ROWS, fragment.rows or BATCH_ROWS)
    if file is not None:
        return file.iter_batches(most, row_groups=[fragment.row_group], columns=chosen), names
    if not isinstance(table, pa.Table):
        start, count = fragment.first_row - 1, fragment.rows or fragment.size or 0
        table = table.select_columns(chosen)[start : start + count]
    return iter(table.select(chosen).to_batches(max_chunksize=most)), names
