"""The files of a shard. No torch: the processes that read ahead for a worker must start quickly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.data.batch_plan import Plan
from ofmu_ray.storage import locate


def shard_files(plan: Plan, shard: int, start_round: int = 0) -> list[str]:
    """Files of a shard, starting with the one that contains `start_round` (the last one if the plan ends before it)."""
    first = min(start_round, plan.rounds - 1) // plan.rounds_per_file
    return [plan.file(shard, number) for number in range(first, plan.files)]


Reading = Callable[[pa.Table, Plan], pa.Table]
"""What completes the rows of a plan as they are read."""


def read_pieces(path: str, plan: Plan | None = None, reading: Reading | None = None) -> Iterator[pa.Table]:
    """One file of a shard, one row group (a few megabytes) at a time."""
    filesystem, inside = locate(path)
    with filesystem.open_input_file(inside) as stream:
        file = pq.ParquetFile(stream)
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            yield table if reading is None or plan is None else reading(table, plan)


def read_ahead(batch: dict[str, Any], plan: Plan | None = None, reading: Reading | None = None) -> Iterator[pa.Table]:
    """`read_pieces` for Ray Data, which passes an array of one `path`."""
    yield from read_pieces(str(batch["path"][0]), plan, reading)
