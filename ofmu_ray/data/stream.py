"""The worker's side of a plan: each worker opens its own lane at the round it is to run, Ray Data reads it ahead.

The shards of `ray.train.get_dataset_shard` would be opened by the trainer's controller, which does not know the round
that a restarted worker finds in its checkpoint; and their equal split drops the remainder of a forget set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import ray.data
from ray.data import DataIterator

from ofmu_ray.cluster.nodes import here, on
from ofmu_ray.data.batch_plan import Plan
from ofmu_ray.data.batches import Collate, RoundBatches, assemble
from ofmu_ray.data.shard_files import lane_files, read_ahead

STORE_SHARE = 0.25
"""Part of a node's object store that its lanes may fill. Ray Data overshoots: at 0.5 it came to 0.85."""
BLOCKS = 16
"""Blocks at least that a lane's part holds: a few are always on their way."""


def lane_iterator(plan: Plan, lane: int, start_round: int = 0, readers: int = 1) -> DataIterator:
    """Ray Data iterator over one lane from the file that holds `start_round`, in order, two files at a time.

    It runs in the process that iterates (a Ray Train worker takes its rank for the lane). Its tasks run on the node of
    that process, so that rows cross the network once, and ask for no CPU: they must run while every core is taken by
    training workers. `readers`: lanes that are read on this node, which share its object store. Each is an execution of
    its own to Ray Data, which would let each of them fill half of the whole cluster's: what is not read yet would be
    spilled to disk and fetched again.
    """
    items = [{"path": path} for path in lane_files(plan, lane, start_round)]
    ahead = ray.data.TaskPoolStrategy(size=min(2, len(items)))
    data = ray.data.from_items(items, override_num_blocks=len(items))
    data = data.map_batches(
        read_ahead, batch_size=1, batch_format="numpy", num_cpus=0, compute=ahead, scheduling_strategy=on(here())
    )
    limit = STORE_SHARE * here().resources["object_store_memory"] / readers
    options = data.context.execution_options
    options.preserve_order = True
    options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=limit)
    data.context.target_max_block_size = min(data.context.target_max_block_size, int(limit / BLOCKS))
    data.context.enable_progress_bars = False
    return data.iterator()


def rounds(
    shard: DataIterator,
    plan: Plan,
    *,
    start_round: int = 0,
    micro_batch_size: int | None = None,
    collate: Collate,
    sidecars: Mapping[str, str] | None = None,
) -> Iterator[RoundBatches]:
    """This worker's batches, {stream: [Batch, ...]} for each round from `start_round` on.

    `shard` may begin earlier than `start_round` but not later. Every lane yields the same number of rounds with the
    same numbers of batches and micro-batches. Micro-batches are those of `collate`, with what the folders of
    `sidecars` (by stream) know about their rows.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else each worker tells of every execution
    tables = shard.iter_batches(batch_size=plan.rows_per_round, batch_format="pyarrow", prefetch_batches=2)
    options: dict[str, Any] = {"micro_batch_size": micro_batch_size, "collate": collate, "sidecars": sidecars}
    yield from assemble(tables, plan, start_round=start_round, **options)
