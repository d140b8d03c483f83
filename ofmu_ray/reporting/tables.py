"""Tables that are written once and shown as HTML, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One cell: its main text, smaller lines below it, and a mark for how it compares."""

    text: str
    lines: tuple[str, ...] = ()
    mark: str = ""
    """A sign after the text."""
    strong: bool = False
    title: str = ""
    """Shown on hover, on the page only."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first `words` columns are words, the rest numbers."""

    name: str
    """Stem of its CSV file; tables of one name share the file."""
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    folded: bool = False
    """Collapsed on the page until opened."""
    records: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """The same as plain values, one mapping per line of the CSV file."""


def cells(*values: str | Cell) -> list[Cell]:
    """A row of cells from texts."""
    return [value if isinstance(value, Cell) else Cell(value) for value in values]


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, with its caption above."""
    header = [_escape(text) for text in table.header]
    rule = ["---" if column < table.words else "---:" for column in range(len(header))]
    lines = [header, rule, *([_markdown_cell(cell) for cell in row] for row in table.rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_escape(table.caption)}\n\n{body}\n" if table.caption else f"{body}\n"


def csv_text(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as CSV with the columns of all of them; None is an empty field."""
    rows = list(records)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _markdown_cell(cell: Cell) -> str:
    text = _escape(cell.text)
    text = f"**{text}**" if cell.strong else text
    text = f"{text} {cell.mark}" if cell.mark else text
    return "<br>".join([text, *(_escape(line) for line in cell.lines)])


def _escape(text: str) -> str:
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("_", "\\_"), ("*", "\\*")):
        text = text.replace(sign, written)
    return " ".join(text.split())
