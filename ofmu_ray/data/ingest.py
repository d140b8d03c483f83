"""How Ray Train hands each worker its lane of a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray.data
from ray.train import DataConfig

from ofmu_ray.data.plan import Plan
from ofmu_ray.data.stream import lane_iterator

DATASET = "plan"
"""Name for `ray.train.get_dataset_shard`."""


def plan_datasets() -> dict[str, Any]:
    """The trainer's `datasets`: a name to ask a shard by; the rows come from `PlanDataConfig`."""
    return {DATASET: ray.data.from_items([{"unused": 0}])}


class PlanDataConfig(DataConfig):  # type: ignore[misc]
    """Gives rank r the iterator over lane r of the plan, from the file that holds `start_round`.

    `start_round` is a number or a callable asked whenever workers (re)start, in the trainer's controller, with
    which round they will resume; it may answer too low (`rounds` skips) but not too high.

        TorchTrainer(loop, datasets=plan_datasets(), dataset_config=PlanDataConfig(plan), ...)
        rounds(ray.train.get_dataset_shard(DATASET), plan, start_round=..., ...)
    """

    def __init__(self, plan: Plan, start_round: int | Callable[[], int] = 0) -> None:
        super().__init__(datasets_to_split=[])  # no barrier: each rank's files are known
        self.plan = plan
        self.start_round = start_round

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Iterators by rank. Raises AssertionError when the plan was written for another number of workers."""
        assert world_size == self.plan.workers, f"a plan for {self.plan.workers} workers, but {world_size} run"
        start = self.start_round() if callable(self.start_round) else self.start_round
        return [{name: lane_iterator(self.plan, rank, start) for name in datasets} for rank in range(world_size)]
