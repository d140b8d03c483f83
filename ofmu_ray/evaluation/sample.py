"""A fixed sample of the evaluation rows, to evaluate many models at a lower cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class RowSample:
    """Some rows of each set, named as in the complete sets: `<set>-<index>`."""

    sets: Mapping[str, Sequence[Mapping[str, Any]]]
    places: Mapping[str, Sequence[int]]
    """Set -> index of each sampled row in the complete set."""

    @classmethod
    def of(cls, sets: Mapping[str, Sequence[Mapping[str, Any]]], count: int | None) -> RowSample:
        """`count` rows of each set, evenly spread; None: all."""
        places = {name: spread(len(rows), count) for name, rows in sets.items()}
        return cls({name: [sets[name][index] for index in indices] for name, indices in places.items()}, places)

    @property
    def row_ids(self) -> list[str]:
        """Names of all sampled rows."""
        return [f"{name}-{index}" for name, indices in self.places.items() for index in indices]

    def named(self, table: pa.Table) -> pa.Table:
        """Rename the sampled rows, numbered from 0 by an evaluation, as in the complete sets."""
        pairs = zip(table["set"].to_pylist(), table["index"].to_pylist(), strict=True)
        named = [(name, self.places[name][index]) for name, index in pairs]
        indices = pa.array([index for _, index in named], pa.int32())
        for column, values in (("index", indices), ("row_id", pa.array([f"{name}-{index}" for name, index in named]))):
            table = table.set_column(table.schema.get_field_index(column), column, values)
        return table

    def cut(self, table: pa.Table | None) -> pa.Table | None:
        """The sampled rows of a table of all rows."""
        return None if table is None else table.filter(pc.is_in(table["row_id"], pa.array(self.row_ids)))


def spread(rows: int, count: int | None) -> Sequence[int]:
    """`count` of `rows` indices, evenly spread (TOFU's rows are grouped by author); None: all."""
    if count is None or count >= rows:
        return range(rows)
    return [index * rows // count for index in range(count)]


def metrics_of(
    table: Any, retrained: Any, sample: RowSample | None, bootstrap_samples: int, seed: int
) -> dict[str, Any] | None:
    """Metrics of a model as plain values; None without a table. `retrained`: its table of all rows."""
    if table is None:
        return None
    from ofmu_ray.metrics.summary import summarise

    retrained = retrained if sample is None else sample.cut(retrained)
    metrics = summarise(table, retrained, bootstrap_samples=bootstrap_samples, seed=seed)
    return {name: metric.to_json() for name, metric in metrics.items()}
