"""The worker's side of a plan: each worker opens its shard at its next round, and Ray Data reads ahead.

Not `ray.train.get_dataset_shard`: the trainer's controller would open those shards, but it does not know the round in
the checkpoint of a restarted worker; and their equal split drops the remainder of a forget set.
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
from ofmu_ray.data.shard_files import Reading, read_ahead, shard_files

STORE_SHARE = 0.25
"""Share of a node's object store for its shards. Ray Data overshoots: at 0.5 it reached 0.85."""
BLOCKS = 16
"""Minimum number of blocks in a shard's part of the store: a few are always in flight."""


def shard_iterator(
    plan: Plan, shard: int, start_round: int = 0, readers: int = 1, reading: Reading | None = None
) -> DataIterator:
    """Ray Data iterator over one shard from the file that contains `start_round`, in order, two files at a time.

    It runs in the process that iterates (the shard of a Ray Train worker is its rank). Its tasks run on the node of
    that process, so rows cross the network once. They request no CPU, because they must run while training workers
    occupy every core. `readers`: shards that are read on this node and share its object store. Ray Data treats each as
    a separate execution and would let it fill half of the cluster's object store: unread rows would be spilled to disk
    and fetched again. `reading` completes the rows, in these tasks.
    """
    items = [{"path": path} for path in shard_files(plan, shard, start_round)]
    ahead = ray.data.TaskPoolStrategy(size=min(2, len(items)))
    data = ray.data.from_items(items, override_num_blocks=len(items))
    data = data.map_batches(
        read_ahead,
        fn_kwargs={"plan": plan, "reading": reading},
        batch_size=1,
        batch_format="numpy",
        num_cpus=0,
        compute=ahead,
        scheduling_strategy=on(here()),
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

    `shard` may start before `start_round` but not after. Every shard yields the same number of rounds with the same
    numbers of batches and micro-batches. Micro-batches come from `collate`, plus the values of their rows in the
    folders of `sidecars` (by stream).
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # otherwise each worker logs every execution
    tables = shard.iter_batches(batch_size=plan.rows_per_round, batch_format="pyarrow", prefetch_batches=2)
    options: dict[str, Any] = {"micro_batch_size": micro_batch_size, "collate": collate, "sidecars": sidecars}
    yield from assemble(tables, plan, start_round=start_round, **options)
