"""The utility monitored during a run: the task's, on a fixed sample of retain rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ofmu_ray.data.batches import Collate
from ofmu_ray.data.sidecar import read_rows
from ofmu_ray.engines.protocol import Batch, Engine
from ofmu_ray.tasks.protocol import Task

ROWS_PER_BATCH = 16
TOKENS_PER_BATCH = 4096
"""Of long rows, fewer at a time: 512 tokens each make 8, whose logits over 152,000 tokens are at most 2.5 GB."""


class UtilityProbe:
    """This rank's shard of the sample; all ranks run the same number of batches (ZeRO-3 is collective)."""

    def __init__(self, task: Task, collate: Collate, rows_path: str, rank: int, world: int):
        self.task = task
        rows = read_rows(rows_path).to_pylist()
        share = -(-len(rows) // world)
        mine = rows[rank * share : (rank + 1) * share]
        self.weights = [1.0] * len(mine) + [0.0] * (share - len(mine))
        mine += [rows[0]] * (share - len(mine))
        longest = max(len(row.get("input_ids", ())) for row in rows) or 1  # the same on all ranks
        size = max(1, min(ROWS_PER_BATCH, TOKENS_PER_BATCH // longest))
        self.batches = [Batch(micro=[collate(mine[start : start + size])]) for start in range(0, share, size)]

    def measure(self, engine: Engine) -> float:
        """Mean of the task's utility over the sample. Collective."""
        values = torch.cat([rows for batch in self.batches for rows in engine.evaluate(batch, self.task.utility)])
        weights = torch.tensor(self.weights, dtype=torch.float64)
        total = torch.stack([(values * weights).sum(), weights.sum()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            total = total.to(engine.device)
            dist.all_reduce(total)
        return float(total[0] / total[1])
