"""Multiple-choice questions like those of WMDP and MMLU: {question, choices, answer: index of the right choice}."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ofmu_ray.config import SourceConfig
from ofmu_ray.data import row_checks as checks
from ofmu_ray.data import sources
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.data.sources import UnreadableRow

Scoring = Literal["letters", "cloze"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WMDP_TOPICS = {"wmdp-bio": "biology", "wmdp-chem": "chemistry", "wmdp-cyber": "cybersecurity"}
"""Hub configuration -> subject for the header; WMDP's rows do not name it."""


@dataclass(frozen=True)
class ChoiceRow:
    """One question. `subject` is in the prompt's header (None: no header); `cluster` is the row's own subject."""

    row_id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None
    cluster: str | None = None


def choice_rows(
    source: SourceConfig, root: str | None = None, *, name: str, option: str, subject: str | None = None
) -> list[ChoiceRow]:
    """Rows of a file, folder or hub data set (cais/wmdp and cais/mmlu: with hub_config, and hub_split test).

    `name` is the prefix of the row ids; `option` names the source in messages. The header names `subject`, else the
    subject of a WMDP configuration, else the row's `subject` column.

    Raises UserError with every problem of the file: rows by number, never their text.
    """
    subject = subject or _topic(source)
    problems, rows = Problems(), []
    for piece in sources.fragments(source, root, stream=name, option=option):
        for number, cells in sources.read(piece, ("question", "choices", "answer", "subject"), some=True):
            place = f"row {number}" if piece.file is None else f"file {piece.file} row {number}"
            if isinstance(cells, UnreadableRow):
                problems.add(cells.kind, place)
            elif row := _row(cells, piece.row_id(number), subject, problems, place):
                rows.append(row)
    problems.empty = not rows and not problems.counts
    checks.refuse({option: (source.shown, problems)})
    return rows


def _topic(source: SourceConfig) -> str | None:
    """The subject of a WMDP configuration, by the name of the configuration, or of a folder or file of it."""
    named = [source.hub_config or "", *source.paths]
    return next((topic for name, topic in WMDP_TOPICS.items() if any(name in each for each in named)), None)


def _row(
    cells: Mapping[str, Any], row_id: str, subject: str | None, problems: Problems, place: str
) -> ChoiceRow | None:
    question = checks.cell(cells, "question", None, problems, place)
    choices, answer, own = cells.get("choices"), cells.get("answer"), cells.get("subject")
    if not (isinstance(choices, list) and all(isinstance(text, str) and text.strip() for text in choices)):
        problems.add("column 'choices' is not a list of texts", place)
        return None
    if not 2 <= len(choices) <= len(LETTERS):
        problems.add(f"{len(choices)} choices; it takes 2 to {len(LETTERS)}", place)
        return None
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        problems.add("column 'answer' is not the number of a choice (0 is the first)", place)
        return None
    cluster = own if isinstance(own, str) and own.strip() else None
    return (
        None if question is None else ChoiceRow(row_id, question, tuple(choices), answer, subject or cluster, cluster)
    )
