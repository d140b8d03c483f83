"""The files of a shard. No torch: the processes that read ahead for a worker must start quickly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.data.batch_plan import Plan
from ofmu_ray.storage import locate


def shard_files(plan: Plan, shard: int, start_round: int = 0) -> list[str]:
    """Files of a shard, starting with the one that contains `start_round` (the last one if the plan ends before it)."""
    first = min(start_round, plan.rounds - 1) // plan.rounds_per_file
    return [plan.file(shard, number) for number in range(first, plan.files)]


def read_pieces(path: str) -> Iterator[pa.Table]:
    """One file of a shard, one row group (a few megabytes) at a time."""
    filesystem, inside = locate(path)
    with filesystem.open_input_file(inside) as stream:
        file = pq.ParquetFile(stream)
        for number in range(file.num_row_groups):
            yield file.read_row_group(number)


def read_ahead(batch: dict[str, Any]) -> Iterator[pa.Table]:
    """`read_pieces` for Ray Data, which passes an array of one `path`."""
    yield from read_pieces(str(batch["path"][0]))
