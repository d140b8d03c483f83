"""Cache of evaluations by content: the same weights, rows, format and metric version never run twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.evaluation.rows import MEASURED, EvaluationRow, without_private_text
from ofmu_ray.metrics.functions import METRIC_VERSION
from ofmu_ray.storage import PathLike, atomic_write, is_file, join, locate


def cache_key(model: str, template: str, rows: Sequence[EvaluationRow], max_new_tokens: int, arithmetic: str) -> str:
    """Hex digest (32 digits) of everything that determines a set's per-row values.

    `model`, `template`: fingerprints. `arithmetic`: device kind and number format, because their rounding differs.
    Batch size and number of actors are not included: they only affect rounding.
    """
    content = [METRIC_VERSION, model, template, max_new_tokens, arithmetic, [asdict(row) for row in rows]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


class TableCache:
    """`<cache folder>/<kind>/<key>.parquet`: tables without private text."""

    def __init__(self, cache_folder: PathLike, kind: str) -> None:
        self.folder = join(cache_folder, kind)

    def load(self, key: str) -> pa.Table | None:
        """The stored table, or None."""
        path = join(self.folder, f"{key}.parquet")
        if not is_file(path):
            return None
        filesystem, inside = locate(path)
        return pq.read_table(inside, filesystem=filesystem, partitioning=None)

    def save(self, key: str, table: pa.Table) -> None:
        """Store a table atomically."""
        content = pa.BufferOutputStream()
        pq.write_table(table, content)
        atomic_write(join(self.folder, f"{key}.parquet"), content.getvalue().to_pybytes())


class EvaluationCache(TableCache):
    """Per-row values of sets, without the text of private ones."""

    def __init__(self, cache_folder: PathLike) -> None:
        super().__init__(cache_folder, "evaluation")

    def load(self, key: str) -> pa.Table | None:
        table = super().load(key)
        if table is None:
            return None
        # stored before a column was added: its rows have none of it
        return pa.concat_tables([MEASURED.empty_table(), table], promote_options="permissive").cast(MEASURED)

    def save(self, key: str, table: pa.Table) -> None:
        super().save(key, without_private_text(table))
