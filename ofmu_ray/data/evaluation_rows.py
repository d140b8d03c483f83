"""Evaluation rows in TOFU's layout. They are read and checked on the driver, because these sets are small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ofmu_ray.config import FormatConfig, SourceConfig
from ofmu_ray.data import row_checks as checks
from ofmu_ray.data import sources
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.data.sources import UnreadableRow

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
) -> list[dict[str, Any]]:
    """Rows {row_id, question, answer[, paraphrased_answer: str][, perturbed_answer: list[str]][, cluster: str]}.

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
    for piece in sources.fragments(config, root, stream=name, option=option):
        for number, row in sources.read(piece):
            if limit is not None and len(raw) == limit:
                break
            place = f"row {number}" if piece.file is None else f"file {piece.file} row {number}"
            if isinstance(row, UnreadableRow):
                problems.add(row.kind, place)
            else:
                raw.append((place, row))
                rows.append({"row_id": piece.row_id(number)})
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
    problems.empty = not raw and not problems.counts
    checks.refuse({option: (config.shown, problems)})
    return rows


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
