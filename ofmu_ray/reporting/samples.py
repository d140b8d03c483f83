"""Generations before and after, row by row, and the share of degenerate ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ofmu_ray.evaluation.rows import is_private
from ofmu_ray.metrics.generations import damage

CONTINUED = frozenset({"text", "verbatim"})
"""Kinds of rows whose generations continue a text."""
BEFORE, AFTER = 160, 600
"""Characters of a continued text that are shown."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Generation:
    """What one model generated for a row."""

    rouge: float | None
    tokens: int | None
    text: str | None
    """None: not kept, or must not be shown."""


@dataclass(frozen=True)
class Sample:
    """One row's generations by model; the texts are None unless they may be shown."""

    row_id: str
    question: str | None
    """Of a continuation: the end of the text before it."""
    answer: str | None
    """Of a continuation: as much of the text as the generations are compared with, about."""
    generations: dict[str, Generation]
    continues: bool = False
    """The generations continue a text."""


@dataclass(frozen=True)
class Degeneration:
    """Generations of one model on one set: shares in [0, 1]; None: not measured."""

    set: str
    model: str
    rows: int
    empty: float | None
    repetition: float | None
    tokens: float | None
    """Mean length (tokens)."""


def sample_rows(
    tables: Mapping[str, Any], texts: Mapping[str, tuple[str, str]], count: int, *, reveal: bool
) -> dict[str, list[Sample]]:
    """The `count` rows of each set that unlearning damaged most, with each model's generations.

    Damage is an empty or repetitive generation; in sets to keep, also what ROUGE-L lost since before.

    Args:
        tables: model -> per-row values (pyarrow; columns row_id, set and, where measured, rouge_l_recall,
            generated_tokens, generated).
        texts: row id -> (question, answer), for sets whose text may be shown.
        reveal: also show the text of forget rows.
    """
    by_model = {model: _by_set(table) for model, table in tables.items()}
    names = list(dict.fromkeys(name for sets in by_model.values() for name in sets))
    samples: dict[str, list[Sample]] = {}
    for name in names:
        shown = reveal or not is_private(name)
        ids = list(dict.fromkeys(row_id for sets in by_model.values() for row_id in sets.get(name, {})))
        ids = sorted(ids, key=partial(_damage, by_model, name), reverse=True)[:count]
        samples[name] = []
        for row_id in ids:
            question, answer = texts.get(row_id, (None, None)) if shown else (None, None)
            rows = {model: sets[name][row_id] for model, sets in by_model.items() if row_id in sets.get(name, {})}
            continues = any(row.get("kind") in CONTINUED for row in rows.values())
            if continues and question and answer:
                question, answer = _cut(question[::-1], BEFORE)[::-1], _cut(answer, AFTER)
            generations = {model: _generation(row, shown) for model, row in rows.items()}
            samples[name].append(Sample(row_id, question, answer, generations, continues))
    return {name: rows for name, rows in samples.items() if rows}


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _damage(by_model: Mapping[str, Mapping[str, Mapping[str, Row]]], name: str, row_id: str) -> float:
    before, after = (by_model.get(model, {}).get(name, {}).get(row_id, {}) for model in ("before", "after"))
    was, now = (_rouge(row) for row in (before, after))
    lost = 0.0 if is_private(name) or was is None or now is None else was - now
    return max(damage(after), lost)


def degeneration(tables: Mapping[str, Any]) -> list[Degeneration]:
    """Empty and repetitive generations by set and model, so that damage is not mistaken for forgetting."""
    shares = []
    for model, table in tables.items():
        for name, rows in _by_set(table).items():
            values = list(rows.values())
            empty, repeated, tokens = (_mean(values, c) for c in ("generated_empty", "repetition", "generated_tokens"))
            if any(value is not None for value in (empty, repeated, tokens)):
                shares.append(Degeneration(name, model, len(values), empty, repeated, tokens))
    order = list(dict.fromkeys(row.set for row in shares))
    return sorted(shares, key=lambda row: order.index(row.set))


def _by_set(table: Any) -> dict[str, dict[str, Row]]:
    """set -> row id -> row, in the table's order."""
    sets: dict[str, dict[str, Row]] = {}
    for row in table.to_pylist():
        if row.get("correct") is not None or row.get("kind") == "document":
            continue  # nothing is generated
        sets.setdefault(row["set"], {})[row["row_id"]] = row
    return sets


def _generation(row: Row, shown: bool) -> Generation:
    return Generation(_rouge(row), row.get("generated_tokens"), row.get("generated") if shown else None)


def _rouge(row: Row) -> float | None:
    values = (row.get(name) for name in ("rouge_l_recall", "rouge_l_f", "rouge"))
    value: float | None = next((value for value in values if value is not None), None)
    return value


def _mean(rows: list[Row], column: str) -> float | None:
    values = [float(row[column]) for row in rows if row.get(column) is not None]
    return sum(values) / len(values) if values else None
