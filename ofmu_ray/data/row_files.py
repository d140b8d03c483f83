"""Files of rows that are read from start to end: JSON Lines, JSON arrays, CSV, TSV, plain text; also compressed."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ofmu_ray.storage import locate, without_credentials

PACKED = (".gz", ".bz2", ".zst")
"""Suffixes by which pyarrow decompresses."""
ROW_FILES = {
    kind: tuple(f".{name}{packed}" for name in names for packed in ("", *PACKED))
    for kind, names in {
        "json": ("json", "jsonl", "ndjson"),
        "csv": ("csv",),
        "tsv": ("tsv",),
        "text": ("txt",),
    }.items()
}
"""Kind -> suffixes."""
TEXT = "text"
"""The column of a plain text file, which is one row, and of the texts of a JSON array."""

_LARGEST_CELL = 2**31 - 1
_WHITE, _MARK = b" \t\r\n", b"\xef\xbb\xbf"


@dataclass(frozen=True)
class UnreadableRow:
    """A row that could not be read; without its text."""

    kind: str


Row = tuple[int, dict[str, Any] | UnreadableRow]


def row_file(path: str) -> str | None:
    """The kind of a file by its suffix, or None."""
    return next((kind for kind, suffixes in ROW_FILES.items() if path.endswith(suffixes)), None)


def starts_array(path: str) -> bool:
    """Whether a JSON file is one array of objects, not lines."""
    filesystem, inside = locate(path)
    with filesystem.open_input_stream(inside, compression=None) as file:
        while chunk := file.read(1 << 12):
            if start := chunk.removeprefix(_MARK).lstrip(_WHITE):
                return bool(start[:1] == b"[")
    return False


def read_file(kind: str, path: str, span: tuple[int, int] | None = None, first: int = 1) -> Iterator[Row]:
    """(row number from 1, row) of each row; in JSON Lines the number is the line's.

    `span`: first byte, and the one after the last, of the lines to read of JSON Lines, the first of which is number
    `first`.

    All cells of CSV and TSV are texts; the first line names the columns.
    """
    number = 0
    try:
        for number, row in _read(kind, path) if span is None else _range(path, span, first):
            yield number, row
    except OSError:
        if not without_credentials(path).endswith(PACKED):
            raise
        yield number + 1, UnreadableRow("cannot be decompressed")


def _read(kind: str, path: str) -> Iterator[Row]:
    filesystem, inside = locate(path)
    with filesystem.open_input_stream(inside, buffer_size=1 << 20) as file:
        if kind == "json":
            yield from _json(file)
        elif kind == "text":
            yield 1, _decoded(file.read())
        else:
            yield from _table(file, "\t" if kind == "tsv" else ",")


def _range(path: str, span: tuple[int, int], first: int) -> Iterator[Row]:
    filesystem, inside = locate(path)
    start, stop = span
    with filesystem.open_input_file(inside) as file:
        yield from _rows(_lines(file.get_stream(start, stop - start)), first)


def _decoded(content: bytes) -> dict[str, Any] | UnreadableRow:
    try:
        return {TEXT: content.decode("utf-8-sig")}
    except UnicodeDecodeError:
        return UnreadableRow("not UTF-8")


def _json(file: Any) -> Iterator[Row]:
    """JSON Lines, or one array of objects, or of texts (each a document)."""
    lines = enumerate(_lines(file), start=1)
    number, first = next(((at, line) for at, line in lines if line.removeprefix(_MARK).strip()), (1, b""))
    rest = (line for _, line in lines)
    if first.removeprefix(_MARK).lstrip(_WHITE)[:1] == b"[":
        yield from _array(b"\n".join([first, *rest]))
        return
    yield from _rows(itertools.chain([first], rest), number)


def _rows(lines: Iterable[bytes], first: int) -> Iterator[Row]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError):  # no JSON, not UTF-8, a number of thousands of digits; nested too deep
            yield number, UnreadableRow("not JSON (one object per line, or an array of them, is expected)")
            continue
        yield number, _object(row)


def _array(content: bytes) -> Iterator[Row]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # no JSON, not UTF-8, a number of thousands of digits; nested too deep
        yield 1, UnreadableRow("not JSON (the file starts an array that cannot be read to its end)")
        return
    for number, row in enumerate(rows, start=1):
        yield number, {TEXT: row} if isinstance(row, str) else _object(row)


def _object(row: Any) -> dict[str, Any] | UnreadableRow:
    return row if isinstance(row, dict) else UnreadableRow("not a JSON object")


def _lines(file: Any) -> Iterator[bytes]:
    """Lines of an Arrow stream; the last one may lack its newline."""
    rest = b""
    while chunk := file.read(1 << 20):
        *complete, rest = (rest + chunk).split(b"\n")
        yield from complete
    if rest:
        yield rest


def _table(file: Any, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_CELL)  # documents are longer than 128 KiB
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv.Error, UnicodeDecodeError) as error:
            fault = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "broken quotes"
            yield number, UnreadableRow(f"{fault}; the rest of the file was not read")
            return
        yield number, UnreadableRow("more cells than the first line has columns") if None in row else dict(row)
