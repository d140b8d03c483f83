"""Evaluation rows in the layout of MUSE's release (Shi et al. 2024, arXiv 2407.06460)."""

from __future__ import annotations

from typing import Any, Literal

from ofmu_ray.config import EvaluationSetsConfig, SourceConfig
from ofmu_ray.data import row_checks as checks
from ofmu_ray.data.evaluation_rows import readable
from ofmu_ray.data.row_checks import Problems

MuseKind = Literal["verbatim", "knowledge", "document"]
MUSE_SETS: dict[str, MuseKind] = {
    "forget_verbatim": "verbatim",
    "forget_knowledge": "knowledge",
    "retain_knowledge": "knowledge",
    "forget_documents": "document",
    "holdout_documents": "document",
}
"""Set, and option of evaluation.sets -> what its rows are."""
_COLUMNS: dict[MuseKind, tuple[str, ...]] = {
    "verbatim": ("prompt", "gt"),
    "knowledge": ("question", "answer"),
    "document": ("text",),
}


def muse_sets(sets: EvaluationSetsConfig, root: str | None, limit: int | None) -> dict[str, list[dict[str, Any]]]:
    """The configured ones, the first `limit` rows of each: {row_id, question, answer, kind[, examples]}.

    verbatim: `question` is the text to continue. knowledge: `examples` are the questions with answers that precede it
    (evaluation.sets.<forget or retain>_examples). document: only an `answer`, the text.

    Raises UserError with every problem of a file.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, kind in MUSE_SETS.items():
        path = getattr(sets, name)
        if path is None:
            continue
        rows: list[dict[str, Any]] = [
            {"row_id": row_id, "question": texts[0] if len(texts) > 1 else "", "answer": texts[-1], "kind": kind}
            for row_id, texts in _read(path, root, name, _COLUMNS[kind], limit)
        ]
        examples = f"{name.partition('_')[0]}_examples"
        if kind == "knowledge" and getattr(sets, examples) is not None:
            shots = [tuple(texts) for _, texts in _read(getattr(sets, examples), root, examples, _COLUMNS[kind], None)]
            rows = [row | {"examples": shots} for row in rows]
        found[name] = rows
    return found


def _read(
    path: str, root: str | None, name: str, columns: tuple[str, ...], limit: int | None
) -> list[tuple[str, list[str]]]:
    """(row id, the columns' texts) of each row."""
    option, source, problems, rows = f"evaluation.sets.{name}", SourceConfig(path=path), Problems(), []
    for row_id, place, cells in readable(source, root, name, option, problems, limit):
        texts = [checks.cell(cells, column, None, problems, place) for column in columns]
        rows.append((row_id, [text for text in texts if text is not None]))
    problems.empty = not rows and not problems.counts
    checks.refuse({option: (source.shown, problems)})
    return rows
