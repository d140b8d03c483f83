"""Evaluation rows: questions in TOFU's layout, passages of documents, turns of chats.

They are read and checked on the driver, because these sets are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ofmu_ray.config import FormatConfig, SourceConfig
from ofmu_ray.config.data import Kind
from ofmu_ray.data import row_checks as checks
from ofmu_ray.data import sources
from ofmu_ray.data.chats import COMPLETION, PROMPT, SHAREGPT, chat_of
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.data.sources import Fragment, UnreadableRow
from ofmu_ray.data.windows import TextLayout

PARAPHRASED, PERTURBED = "paraphrased_answer", "perturbed_answer"


def evaluation_rows(
    source: str | SourceConfig,
    root: str | None,
    limit: int | None = None,
    *,
    name: str = "evaluation",
    option: str = "evaluation.sets",
    fmt: FormatConfig | None = None,
    cluster: int | str | None = None,
    kind: Kind | None = "qa",
    layout: Callable[[], TextLayout] | None = None,
) -> list[dict[str, Any]]:
    """Rows {row_id, question, answer[, paraphrased_answer: str][, perturbed_answer: list[str]][, cluster: str]}.

    `kind`: what the rows are; None: `fmt.kind`, but questions if they have a column of questions. Of kind text, a row
    is a passage: a window of a document by `layout`, its first half as `question` and its second as `answer`, `kind`,
    and `ends`, whether the document ends there. Of kind messages, it is a turn of the assistant: `turns` before it, the
    last of which is also the `question`, and `kind`. Passages of a document, and turns of a chat, are a cluster.

    `cluster`: which rows belong together: n for n consecutive rows, or a column. Clusters are numbered in order of
    appearance; the column's content is not used, because it may name a person.
    `name` is the prefix of the row ids; `fmt` maps the question and answer columns (default: question, answer). A
    paraphrase or perturbed column must be in all rows or in none.

    Raises UserError with every problem of the file (as `prepare_streams`).
    """
    config = SourceConfig(path=source, limit=limit) if isinstance(source, str) else source
    fmt = fmt or FormatConfig()
    problems = Problems()
    rows: list[dict[str, Any]] = []
    raw: list[tuple[str, Mapping[str, Any]]] = []
    pieces = sources.fragments(config, root, stream=name, option=option)
    columns = _columns(fmt, kind) | ({cluster} if isinstance(cluster, str) else set())
    for piece, number, row in _first(pieces, columns, limit):
        place = f"row {number}" if piece.file is None else f"file {piece.file} row {number}"
        if isinstance(row, UnreadableRow):
            problems.add(row.kind, place)
        else:
            raw.append((place, row))
            rows.append({"row_id": piece.row_id(number)})
    if kind is None:
        kind = "qa" if any({fmt.question, "question"} & set(cells) for _, cells in raw) else fmt.kind
    if kind == "qa":
        _questions(rows, raw, fmt, cluster, problems)
    else:
        parts = _passages(raw, fmt, layout, problems) if kind == "text" else _turns(raw, fmt, problems)
        rows = [
            {"row_id": f"{rows[index]['row_id']}.{number}", **part, "kind": kind, "cluster": str(index)}
            for index, number, part in itertools.islice(parts, limit)
        ]
    problems.empty = not raw and not problems.counts
    checks.refuse({option: (config.shown, problems)})
    return rows


def _columns(fmt: FormatConfig, kind: Kind | None) -> set[str]:
    """The columns that rows of a kind may have, as far as they count."""
    of = {
        "qa": {fmt.question, fmt.answer, "question", PARAPHRASED, PERTURBED},
        "text": {fmt.text},
        "messages": {fmt.messages, SHAREGPT, PROMPT, COMPLETION},
    }
    return of["qa"] | of[fmt.kind] if kind is None else of[kind]


def _first(
    pieces: Sequence[Fragment], columns: set[str], limit: int | None
) -> Iterator[tuple[Fragment, int, dict[str, Any] | UnreadableRow]]:
    """(fragment, number, row) of the first rows: no more are read."""
    left = limit
    for piece in pieces:
        if left is not None and piece.part is None:
            piece = replace(piece, rows=left if piece.rows is None else min(left, piece.rows))
        for number, row in sources.read(piece, columns, some=True):
            if left == 0:
                return
            left = None if left is None else left - 1
            yield piece, number, row
        if left == 0:
            return


def readable(
    source: SourceConfig, root: str | None, name: str, option: str, problems: Problems, limit: int | None = None
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(row id, place for messages, cells) of the first `limit` rows that can be read; adds the others to `problems`."""
    read = 0
    for piece in sources.fragments(source, root, stream=name, option=option):
        for number, row in sources.read(piece):
            if read == limit:
                return
            place = f"row {number}" if piece.file is None else f"file {piece.file} row {number}"
            if isinstance(row, UnreadableRow):
                problems.add(row.kind, place)
            else:
                read += 1
                yield piece.row_id(number), place, row


_Raw = Sequence[tuple[str, Mapping[str, Any]]]
_Part = tuple[int, int, dict[str, Any]]
"""(index of the row, number of the part from 1, columns)."""


def _passages(
    raw: _Raw, fmt: FormatConfig, layout: Callable[[], TextLayout] | None, problems: Problems
) -> Iterator[_Part]:
    assert layout is not None, "passages are cut by a tokenizer"
    cutter = layout()
    for index, (place, cells) in enumerate(raw):
        text = checks.document(cells, fmt, problems, place)
        for number, (first, second, ends) in enumerate(() if text is None else cutter.passages(text), start=1):
            yield index, number, {"question": first, "answer": second, "ends": ends}


def _turns(raw: _Raw, fmt: FormatConfig, problems: Problems) -> Iterator[_Part]:
    for index, (place, cells) in enumerate(raw):
        chat = chat_of(cells, fmt, problems, place)
        for number, at in enumerate(() if chat is None else chat.answers, start=1):
            assert chat is not None
            turns = chat.turns[:at]
            question = turns[-1]["content"] if turns else ""
            yield index, number, {"question": question, "answer": chat.turns[at]["content"], "turns": turns}


def _questions(
    rows: list[dict[str, Any]], raw: _Raw, fmt: FormatConfig, cluster: int | str | None, problems: Problems
) -> None:
    """Fill in the rows."""
    extras = [column for column in (PARAPHRASED, PERTURBED) if any(cells.get(column) is not None for _, cells in raw)]
    groups: dict[str, int] = {}
    for index, ((place, cells), out) in enumerate(zip(raw, rows, strict=True)):
        _fill(out, cells, fmt, extras, problems, place)
        if isinstance(cluster, int):
            out["cluster"] = str(index // cluster)
        elif cluster is not None and cells.get(cluster) is None:
            problems.add(f"column {cluster!r} (evaluation.clusters) is missing", place)
        elif cluster is not None:
            out["cluster"] = str(groups.setdefault(str(cells[cluster]), len(groups)))


def _fill(
    out: dict[str, Any], row: Mapping[str, Any], fmt: FormatConfig, extras: list[str], problems: Problems, place: str
) -> None:
    if texts := checks.pair(row, fmt, problems, place):
        out["question"], out["answer"] = texts
    if PARAPHRASED in extras:
        out[PARAPHRASED] = checks.cell(row, PARAPHRASED, option=None, problems=problems, place=place)
    if PERTURBED in extras:
        wrong = row.get(PERTURBED)
        if isinstance(wrong, list) and wrong and all(isinstance(text, str) and text.strip() for text in wrong):
            out[PERTURBED] = wrong
        else:
            problems.add(f"column {PERTURBED!r} is not a list of texts", place)
