"""The worker's side of a plan: Ray Train hands each worker its lane, Ray Data reads it ahead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataIterator
from ray.train import DataConfig

from ofmu_ray.data.batches import RoundBatches, assemble, collate, lane_files, read_file
from ofmu_ray.data.plan import Plan, read_plan

__all__ = ["DATASET", "PlanDataConfig", "RoundBatches", "collate", "lane_iterator", "rounds"]

DATASET = "plan"
"""Name for `ray.train.get_dataset_shard`."""


class PlanDataConfig(DataConfig):  # type: ignore[misc]
    """Gives rank r the iterator over lane r of the plan, from the file that holds `start_round`.

    `start_round` is a number or a callable, which the trainer's controller asks whenever workers (re)start; it may
    answer too low (`rounds` skips what is done, one file at a time) but not too high.

        data = PlanDataConfig(folder)
        TorchTrainer(loop, datasets=data.datasets(), dataset_config=data, ...)
        rounds(ray.train.get_dataset_shard(DATASET), plan, start_round=...)   # in the loop
    """

    def __init__(self, folder: str, start_round: int | Callable[[], int] = 0) -> None:
        super().__init__(datasets_to_split=[])  # no barrier between workers: each rank's files are known
        self.plan = read_plan(folder)
        self.start_round = start_round

    @staticmethod
    def datasets() -> dict[str, Any]:
        """The trainer's `datasets`: a name to ask a shard by; the rows come from `configure`."""
        return {DATASET: ray.data.from_items([{"unused": 0}])}

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """Iterators by rank. Raises AssertionError when the plan was written for another number of workers."""
        assert world_size == self.plan.workers, f"a plan for {self.plan.workers} workers, but {world_size} run"
        start = self.start_round() if callable(self.start_round) else self.start_round
        return [{name: lane_iterator(self.plan, rank, start) for name in datasets} for rank in range(world_size)]


def lane_iterator(plan: Plan, lane: int, start_round: int = 0) -> DataIterator:
    """Ray Data iterator over one lane from the file that holds `start_round`, in order, two files at a time.

    Its tasks ask for no CPU: they must run while every core is taken by training workers.
    """
    items = [{"path": path} for path in lane_files(plan, lane, start_round)]
    ahead = ray.data.TaskPoolStrategy(size=min(2, len(items)))
    data = ray.data.from_items(items, override_num_blocks=len(items))
    data = data.map_batches(_read, batch_size=1, batch_format="numpy", num_cpus=0, compute=ahead)
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    return data.iterator()


def rounds(
    shard: DataIterator, plan: Plan, *, start_round: int = 0, micro_batch_size: int | None = None, pad_id: int
) -> Iterator[RoundBatches]:
    """This worker's batches, {stream: [Batch, ...]} for each round from `start_round` on.

    `shard` may begin earlier than `start_round` but not later. Every lane yields the same number of rounds with the
    same numbers of batches and micro-batches. Micro-batches are those of `batches.collate`.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else each worker tells of every execution
    tables = shard.iter_batches(batch_size=plan.rows_per_round, batch_format="pyarrow", prefetch_batches=2)
    yield from assemble(tables, plan, start_round=start_round, micro_batch_size=micro_batch_size, pad_id=pad_id)


def _read(batch: dict[str, np.ndarray]) -> pa.Table:
    return read_file(str(batch["path"][0]))
