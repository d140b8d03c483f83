"""Problems of a data set, found before any worker starts and reported in one message.

Rows are compared by 16-byte digests of (question, answer), never by their text. Problems name rows only by file and
number.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ofmu_ray.config import FormatConfig, close_match
from ofmu_ray.errors import UserError

Policy = Literal["error", "drop", "allow"]
SHOWN = 5
"""Rows named per kind of problem."""

_SPACES = re.compile(r"\s+")


@lru_cache(maxsize=1)  # the windows of a document follow each other
def digests(question: str, answer: str) -> tuple[bytes, bytes]:
    """16-byte digests of a row, as is and after normalising (NFKC, case, white space)."""
    return _digest(question, answer), _digest(normalise(question), normalise(answer))


def of_piece(digest: bytes, number: int | None) -> bytes:
    """The digest of a part, from that of the whole; the first part's is that of the whole."""
    return digest if number in (None, 1) else hashlib.blake2b(b"%d" % number + digest, digest_size=16).digest()


def normalise(text: str) -> str:
    """NFKC, case folded, runs of white space as one space."""
    return _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _digest(question: str, answer: str) -> bytes:
    return hashlib.blake2b(f"{question}\x00{answer}".encode(), digest_size=16).digest()


@dataclass
class Problems:
    """Counts of problems by kind, with the first few places of each; adds up over fragments."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    """Columns of the first row that lacked one."""
    empty: bool = False
    """The source has no rows at all."""

    def add(self, kind: str, place: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(places := self.places.setdefault(kind, [])) < SHOWN:
            places.append(place)

    def merge(self, other: Problems) -> None:
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.places[kind] = (self.places.get(kind, []) + other.places[kind])[:SHOWN]
        self.columns = self.columns or other.columns

    def lines(self) -> list[str]:
        """One line per kind: how often, and the first places."""
        if self.empty:
            return ["no rows"]
        return [f"{_times(n, 'row')}: {kind} ({_some(self.places[kind], n)})" for kind, n in self.counts.items()]


def cell(row: Mapping[str, Any], column: str, option: str | None, problems: Problems, place: str) -> str | None:
    """The text in a column, or None after adding its problem; `option`: the option that names the column, if any."""
    if column not in row:
        problems.columns = problems.columns or sorted(map(str, row))
        close = close_match(column, problems.columns)
        remedy = f".{close} Set --{option}" if option else ""
        problems.add(f"no column {column!r}, only {', '.join(problems.columns)}{remedy}", place)
    elif row[column] is None:
        problems.add(f"null in column {column!r}", place)
    elif not isinstance(row[column], str):
        problems.add(f"{type(row[column]).__name__} instead of text in column {column!r}", place)
    elif not row[column].strip():
        problems.add(f"empty text in column {column!r}", place)
    elif not encodable(row[column]):
        problems.add(f"half of a surrogate pair in column {column!r}", place)
    else:
        return str(row[column])
    return None


def encodable(text: str) -> bool:
    """Whether the text is valid in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # valid in JSON, but not in UTF-8 or for tokenizers
        return False
    return True


def pair(row: Mapping[str, Any], fmt: FormatConfig, problems: Problems, place: str) -> tuple[str, str] | None:
    """Question and answer of a row, or None after adding every problem of both."""
    question = cell(row, fmt.question, "data.format.question", problems, place)
    answer = cell(row, fmt.answer, "data.format.answer", problems, place)
    return None if question is None or answer is None else (question, answer)


def document(row: Mapping[str, Any], fmt: FormatConfig, problems: Problems, place: str) -> str | None:
    """The text of a row; None if it is shorter than `min_characters`, or after adding its problem."""
    text = row.get(fmt.text)
    if isinstance(text, str) and len(text) < fmt.min_characters:
        return None
    return cell(row, fmt.text, "data.format.text", problems, place)


def refuse(problems: Mapping[str, tuple[str, Problems]], extra: Iterable[str] = ()) -> None:
    """Raise one UserError that lists all problems of all sources ({option: (path, problems)}), if there are any."""
    lines = [f"{option} ({path}): {line}" for option, (path, p) in problems.items() for line in p.lines()]
    lines += extra
    if lines:
        raise UserError("the data cannot be used:\n" + "\n".join(f"  - {line}" for line in lines))


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """Statistics of one source; JSON-able, without any text."""

    source: str
    rows: int
    """Rows read."""
    used_rows: int
    """Rows left after dropping duplicates and overlaps."""
    tokens: int
    """Tokens of the used rows, prompt and answer."""
    label_tokens: int
    """Tokens with a loss (answer and EOS) of the used rows."""
    truncated_rows: int
    """Used rows longer than data.format.max_length."""
    longest: int
    """Longest used row (tokens, after truncation)."""
    exact_duplicates: int
    """Rows whose text occurs earlier in the source."""
    normalised_duplicates: int
    """The same after normalising; includes the exact ones."""
    dropped: int
    dropped_ids: list[str]
    """Ids of dropped rows, at most 1000."""
    sha256: str
    """Digest of the normalised content of all rows, in order; of rows that a pipeline wrote, of its files."""


@dataclass(frozen=True, kw_only=True)
class OverlapReport:
    """Rows of the second source that are also in the first."""

    exact: int
    normalised: int
    """Includes the exact ones."""
    row_ids: list[str]
    """The first few, in the second source."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The data of a run, for its manifest and report."""

    streams: dict[str, StreamReport]
    overlap: OverlapReport | None
    """Overlap of forget and retain; None if the run does not have both."""
    tokenizer_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return asdict(self)


@dataclass(frozen=True)
class Repeats:
    """Which rows of a source occur earlier in it (bool arrays over the rows)."""

    exact: np.ndarray
    normalised: np.ndarray


def repeats(exact: np.ndarray, normalised: np.ndarray) -> Repeats:
    """Rows whose digest (16-byte array) occurs at an earlier index."""
    return Repeats(_occurs_before(exact), _occurs_before(normalised))


def _occurs_before(digest: np.ndarray) -> np.ndarray:
    first = np.unique(digest, return_index=True)[1]
    again = np.ones(len(digest), dtype=bool)
    again[first] = False
    return again


def duplicate_line(option: str, ids: list[str], count: int) -> str:
    return (
        f"{option}: {_times(count, 'duplicate row')} ({_some(ids, count)}); "
        "remove them, or --data.duplicates drop | allow"
    )


def long_line(stream: str, ids: list[str], count: int, lost: int) -> str:
    """`count` rows have `lost` tokens beyond max_length."""
    doing = "forgotten" if stream == "forget" else "learned"
    return (
        f"data.{stream}: {_times(count, 'row')} longer than data.format.max_length ({_some(ids, count)}): "
        f"{lost} tokens would not be {doing}; raise it, or --data.truncate allow"
        + (", or cut documents into windows with --data.format.kind text" if stream == "forget" else "")
    )


def overlap_line(report: OverlapReport) -> str:
    return (
        f"data.retain: {_times(report.normalised, 'row')} also in data.forget, {report.exact} of them exactly "
        f"({_some(report.row_ids, report.normalised)}); the run would train on what it should forget: remove them "
        "from the retain set, or --data.overlap drop | allow"
    )


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _some(places: list[str], count: int) -> str:
    more = count - len(places[:SHOWN])
    return ", ".join(places[:SHOWN]) + (f" and {more} more" if more > 0 else "")
