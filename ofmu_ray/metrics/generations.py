"""Metrics of generations and completions: memorisation, and signs of a damaged generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from ofmu_ray.metrics import memorisation
from ofmu_ray.metrics.columns import clusters_of, finite, of_texts, of_tokens, rows_of
from ofmu_ray.metrics.degeneration import MEASURES, Bounds, SoundRange, ngram_variety
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import MetricValue
from ofmu_ray.metrics.registry import Better, Metric, mean_of, register

COLUMNS = {
    "empty": ("generated_empty", "empty generations"),
    "repetition": ("repetition", "repetition of 4-grams"),
    "length": ("generated_tokens", "generated tokens"),
    "ngram_entropy": ("generated_entropy", "n-gram entropy (bits)"),
    "ngram_variety": ("", "n-gram variety"),
}
"""Measure of a generation -> its column and label."""


def generation_values(rows: pa.Table, name: str, measure: str) -> FloatArray | str:
    """A measure of each generation, [rows]; or the reason for its absence."""
    if measure != "ngram_variety":
        return finite(rows, name, COLUMNS[measure][0])
    entropy, tokens = (finite(rows, name, column) for column in ("generated_entropy", "generated_tokens"))
    if isinstance(entropy, str) or isinstance(tokens, str):
        return entropy if isinstance(entropy, str) else tokens
    return ngram_variety(entropy, tokens)


def completed(value: Callable[[Sequence[bool]], float]) -> Callable[[pa.Table, str], FloatArray | str]:
    """A measure of memorisation as per-row values."""
    return lambda rows, name: of_tokens(rows, name, "answer_matches", value)


for _name, _value, _label, _better in (
    ("forget_extraction_strength", memorisation.extraction_strength, "Forget extraction strength", "retrained"),
    ("forget_exact_memorisation", memorisation.exact_memorisation, "Forget exact memorisation", "retrained"),
    ("retain_extraction_strength", memorisation.extraction_strength, "Retain extraction strength", "high"),
):
    _kind: Better = _better  # type: ignore[assignment]
    _set = _name.partition("_")[0]
    register(
        Metric(
            name=_name, label=_label, better=_kind, alone="low" if _kind == "retrained" else None,
            group="Memorisation", set=_set, values=completed(_value),
        )
    )  # fmt: skip
for _set in ("forget", "retain"):
    for _measure, (_, _words) in COLUMNS.items():
        register(
            Metric(
                name=f"{_set}_{_measure}",
                label=f"{_set.capitalize()} {_words}",
                better="retrained",
                group="Generations",
                set=_set,
                values=partial(generation_values, measure=_measure),
                needs=frozenset({"generations"}),
            )
        )


def sound_generations(
    target: pa.Table | None,
    retrained: pa.Table | None,
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    longest: int | None = None,
) -> SoundRange | None:
    """The baseline for a model's answers to forget prompts: the retrained model's answers to the same prompts; without
    it, the target's answers to holdout prompts, which it never saw, else to retain prompts.

    `longest`: tokens of the model's longest generation. Returns None if nothing was generated, or if the baseline's
    generations are longer and so not comparable.
    """
    options = {"samples": bootstrap_samples, "seed": seed}
    sources = [("retrained", retrained, "forget")] if retrained is not None else []
    sources += [(f"target on {name} rows", target, name) for name in ("holdout", "retain") if retrained is None]
    for whose, table, name in sources:
        rows = None if table is None else rows_of(table, name)
        if rows is None or not rows.num_rows:
            continue
        bounds: dict[str, Bounds] = {}
        for measure in MEASURES:
            values = generation_values(rows, name, measure)
            interval = _bounds(measure, mean_of(values, clusters_of(rows), f"{name}_{measure}", **options))
            if interval is not None:
                bounds[measure] = interval
        if bounds:
            import pyarrow.compute as pc  # costs 0.15 CPU s

            tokens = pc.max(rows["generated_tokens"]).as_py()
            return SoundRange(whose, bounds) if longest is None or longest >= tokens else None
    return None


REPEATS = 0.2
"""A generation repeats itself if at least this share of its 4-grams occurred in it before."""


def damage(row: Mapping[str, Any]) -> float:
    """How broken a row's generation is, 0 to 1: 1 if empty, else its share of repeated 4-grams."""
    return 1.0 if row.get("generated_empty") else float(row.get("repetition") or 0.0)


def damaged_words(table: pa.Table, retrained: pa.Table | None, failed: Sequence[str] | None) -> str | None:
    """How many answers to forget prompts are damaged, as a sentence with a verdict; None without generations.

    `failed`: the measures that are worse than sound ones (`degeneration.failed_measures`); None: unknown.
    """
    counts = [_damaged(model) for model in (table, retrained) if model is not None]
    if counts[0] is None:
        return None
    repeating, empty, rows = counts[0]
    what = "continuations of forget texts" if of_texts(rows_of(table, "forget")) else "answers to forget prompts"
    text = f"{what}: {repeating} of {rows} repeat themselves"
    text += f", {empty} are empty" if empty else ""
    if len(counts) > 1 and counts[1] is not None:
        text += f"; the retrained model: {counts[1][0]}" + (f", {counts[1][1]} empty" if counts[1][1] else "")
    if failed:
        text += f": degenerate ({', '.join(MEASURES[name] for name in failed)})"
    return text + (": not degenerate" if failed == () else "")


def _damaged(table: pa.Table) -> tuple[int, int, int] | None:
    """Forget rows whose generation repeats itself, or is empty, and all with a generation."""
    names = [name for name in ("generated_empty", "repetition") if name in table.column_names]
    rows = [row for row in rows_of(table, "forget").select(names).to_pylist() if row.get("repetition") is not None]
    empty = sum(bool(row.get("generated_empty")) for row in rows)
    return (sum(row["repetition"] >= REPEATS for row in rows), empty, len(rows)) if rows else None


def _bounds(measure: str, mean: MetricValue) -> Bounds | None:
    if mean.value is None or mean.low is None or mean.high is None:
        return None
    low, high = mean.low, mean.high
    # resampling all zeros (variety: ones) gives an interval of width 0; the exact bound on the share of nonzero rows
    # (Clopper and Pearson, 1934), and so on the mean of values in [0, 1], is
    room = 1.0 - 0.025 ** (1.0 / mean.n) if mean.n else 0.0
    if measure == "ngram_variety":
        low = 1.0 - room if mean.value == 1.0 else low
    elif mean.value == 0.0:
        high = room
    return mean.value, low, high
