"""From what somebody asks to a request in the ledger: validation, and the rows it names in the training data.

submit(config, ledger, Submission(key="ticket-17", where={"subject_id": "123"}), by="ops")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from ofmu_ray.config import FormatConfig, SourceConfig, close_match
from ofmu_ray.config.requests import RequestsConfig, duration
from ofmu_ray.data import row_checks, sources
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.errors import UserError
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.records import Request, new_id
from ofmu_ray.requests.vault import Vault, WrongKey, canonical, master_key

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
LONGEST_REASON = 500
MOST_CONDITIONS = 16
NEXT_KEY = ".next"
"""Suffix of a new master key until it takes the old one's place."""
LONGEST_VALUE = 256


def open_ledger(config: RequestsConfig, *, keyed: bool = True) -> Ledger:
    """The configured ledger. Without `keyed` no master key is needed, and no text can be written or read."""
    uri, key_file, key_env = config.ledger_uri, config.key_file, config.requests.key_env
    if not keyed:
        return Ledger(uri)
    try:
        return Ledger(uri, Vault(master_key(key_file, key_env)))
    except WrongKey:
        if key_env is None and Path(f"{key_file}{NEXT_KEY}").exists():
            raise WrongKey(
                f"requests.key_file = {key_file}: its replacement was cut off; `ofmu requests rekey` finishes it"
            ) from None
        raise


@dataclass(frozen=True)
class Submission:
    """What somebody asks for: rows, or a selector over columns of the training data."""

    key: str
    where: Mapping[str, str] | None = None
    """Column -> value; a row must fulfil all conditions."""
    rows: Sequence[Mapping[str, Any]] | None = None
    """Rows with the columns of `data.format`."""
    deadline: str | None = None
    """Null: `requests.deadline`."""
    reason: str | None = None

    def __post_init__(self) -> None:
        if not KEY.fullmatch(self.key):
            raise UserError("key: must be 1 to 128 letters, digits or _ . : -, a letter or digit first")
        if (self.where is None) == (self.rows is None):
            raise UserError("give either rows or where (column=value), and not both")
        if self.where is not None:
            if not 0 < len(self.where) <= MOST_CONDITIONS:
                raise UserError(f"where: needs 1 to {MOST_CONDITIONS} conditions")
            long = [max(len(column), len(value)) > LONGEST_VALUE for column, value in self.where.items()]
            if any(long) or not all(self.where):
                raise UserError(f"where: columns and values have 1 to {LONGEST_VALUE} characters")
        if self.rows is not None and not self.rows:
            raise UserError("rows: none given")
        if self.deadline is not None and not duration("deadline", self.deadline):
            raise UserError("deadline: must be longer than no time, such as 30d")
        if self.reason is not None and len(self.reason) > LONGEST_REASON:
            raise UserError(f"reason: at most {LONGEST_REASON} characters")

    def content(self) -> dict[str, Any]:
        """What decides whether two submissions are the same."""
        rows = None if self.rows is None else [dict(row) for row in self.rows]
        where = None if self.where is None else dict(self.where)
        return {"where": where, "rows": rows, "deadline": self.deadline, "reason": self.reason}


@dataclass(frozen=True)
class MatchedRows:
    """Rows of the training data."""

    rows: list[dict[str, str]]
    """`id`, `question` and `answer` of each."""
    searched: int
    """Rows of the training data."""
    data: str
    """Its fingerprint."""


def submit(config: RequestsConfig, ledger: Ledger, submission: Submission, by: str) -> tuple[Request, bool]:
    """(request, whether it is new) of a submission. The rows are counted before anything is written.

    Raises:
        UserError: no row found, an unknown column, more rows than `requests.largest_share`, the key belongs to
            another submission (KeyTaken).
    """
    content = submission.content()
    _check_rows(submission.rows or (), config.data.format)
    _check_plain(content)
    if (known := ledger.find(submission.key, content)) is not None:
        return known, False
    if submission.where is not None:
        found = by_columns(config, submission.where)
    else:
        asked = {ledger.hashes.row(*_pair(row, config.data.format)) for row in submission.rows or ()}
        found = by_hashes(config, ledger, asked)
    _refuse(config, submission, found)
    counts = {"matched": len(found.rows), "searched": found.searched}
    counts |= {"given": len(submission.rows)} if submission.rows is not None else {}
    proposed = new_id()
    request = ledger.add(
        submission.key,
        content,
        found.rows,
        deadline=duration("deadline", submission.deadline or config.requests.deadline),
        data=found.data,
        by=by,
        detail={"selector": sorted(submission.where)} | counts if submission.where else counts,
        request_id=proposed,
    )
    return request, request.id == proposed  # another client may have been faster


def by_columns(config: RequestsConfig, where: Mapping[str, str]) -> MatchedRows:
    """Rows of the training data whose columns have these values, as text.

    Raises:
        UserError: no row has one of the columns; names the columns there are.
    """
    seen: set[str] = set()

    def fits(row: Mapping[str, Any], _: str, __: str) -> bool:
        seen.update(row)
        return all(column in row and value in _texts(row[column]) for column, value in where.items())

    found = _search(config, fits, list(where))
    for number, column in enumerate(where, start=1):
        if column not in seen:  # the name is not repeated: it may be anything, and messages are kept in logs
            columns = sorted(seen)
            raise UserError(
                f"where: the training data has no column of condition {number}, only {', '.join(columns)}."
                f"{close_match(column, columns)}"
            )
    return found


def by_hashes(config: RequestsConfig, ledger: Ledger, hashes: set[str]) -> MatchedRows:
    """Rows of the training data with these hashes (`ledger.hashes.row`)."""
    return _search(config, lambda _, question, answer: ledger.hashes.row(question, answer) in hashes, [])


def _search(
    config: RequestsConfig, fits: Callable[[Mapping[str, Any], str, str], bool], columns: list[str]
) -> MatchedRows:
    fmt, source = config.data.format, config.requests.train
    pieces = sources.fragments(source, config.data.root, stream="train", option="requests.train")
    problems, rows, searched = Problems(), [], 0
    for name, row in _rows(pieces, [fmt.question, fmt.answer, *columns], problems):
        searched += 1
        pair = row_checks.pair(row, fmt, problems, name)
        if pair is not None and fits(row, *pair):
            rows.append({"id": name, "question": pair[0], "answer": pair[1]})
    row_checks.refuse({"requests.train": (source.shown, problems)})
    return MatchedRows(rows, searched, sources.fingerprint(pieces))


def _rows(
    pieces: list[sources.Fragment], columns: list[str] | None, problems: Problems
) -> Iterator[tuple[str, dict[str, Any]]]:
    for piece in pieces:
        for number, row in sources.read(piece, columns):
            if isinstance(row, sources.UnreadableRow):
                problems.add(row.kind, piece.row_id(number))
            else:
                yield piece.row_id(number), row


def _texts(value: Any) -> tuple[str, ...]:
    """A cell as a selector may write it; null and nested values equal nothing."""
    if isinstance(value, bool):
        return (str(value).lower(),)
    if isinstance(value, float) and value.is_integer():  # whole numbers beside nulls are floats in many Parquet files
        return str(value), str(int(value))
    if isinstance(value, datetime):
        return str(value), value.isoformat()
    return (str(value),) if isinstance(value, (str, int, float, Decimal, date)) else ()


def _refuse(config: RequestsConfig, submission: Submission, found: MatchedRows) -> None:
    share = config.requests.largest_share
    if not found.rows:
        asked = f"all of {', '.join(submission.where)}" if submission.where else "the text of any given row"
        raise UserError(f"no row of the training data ({found.searched} rows) matches {asked}: nothing to forget")
    if len(found.rows) > share * found.searched:
        raise UserError(
            f"{len(found.rows)} of {found.searched} rows match, more than requests.largest_share = {share}: "
            "narrow the request down, or raise the limit"
        )


def rows_of_file(config: RequestsConfig, path: str) -> list[dict[str, str]]:
    """The rows of a file (any format of a data source), with question and answer only."""
    source, fmt, problems = SourceConfig(path=path), config.data.format, Problems()
    pieces = sources.fragments(source, None, stream="rows", option="rows")
    pairs = [
        row_checks.pair(row, fmt, problems, name) for name, row in _rows(pieces, [fmt.question, fmt.answer], problems)
    ]
    row_checks.refuse({"rows": (source.shown, problems)})
    return [{fmt.question: pair[0], fmt.answer: pair[1]} for pair in pairs if pair is not None]


def _check_rows(rows: Sequence[Mapping[str, Any]], fmt: FormatConfig) -> None:
    problems = Problems()
    for number, row in enumerate(rows, start=1):
        row_checks.pair(row, fmt, problems, f"row {number}")
    row_checks.refuse({"rows": ("as submitted", problems)})


def _check_plain(content: Mapping[str, Any]) -> None:
    """Refuse what JSON in UTF-8 cannot say, though Python reads it from a body or a command line."""
    try:
        canonical(content).encode()
    except (ValueError, RecursionError):  # NaN and infinity, half a surrogate pair; nested too deeply
        raise UserError(
            "the request has a value that is not plain JSON (NaN, infinity, half of a surrogate pair, or deeply "
            "nested): correct it, or leave it out"
        ) from None


def _pair(row: Mapping[str, Any], fmt: FormatConfig) -> tuple[str, str]:
    return str(row[fmt.question]), str(row[fmt.answer])


def conditions(words: Sequence[str]) -> dict[str, str]:
    """['subject_id=123', ...] as a selector; UserError for anything else."""
    pairs = [word.partition("=") for word in words]
    if any(not column or not mark for column, mark, _ in pairs):
        raise UserError("--where: must be COLUMN=VALUE, or several of them")
    if len({column for column, _, _ in pairs}) < len(pairs):
        raise UserError("--where: one condition per column")
    return {column: value for column, _, value in pairs}
