"""The utility watched during a run: mean answer probability on a fixed sample of retain rows."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from ofmu_ray.data.stream import collate
from ofmu_ray.engines.language import answer_losses
from ofmu_ray.engines.protocol import Batch, Engine

ROWS_PER_BATCH = 16


class UtilityProbe:
    """Holds this rank's share of the sample; every rank runs the same number of batches (ZeRO-3 is collective)."""

    def __init__(self, rows_path: str, rank: int, world: int, pad_id: int):
        rows = pq.read_table(rows_path).to_pylist()
        share = -(-len(rows) // world)
        mine = rows[rank * share : (rank + 1) * share]
        self.weights = [1.0] * len(mine) + [0.0] * (share - len(mine))
        mine += [rows[0]] * (share - len(mine))
        self.batches = [
            Batch(micro=[collate(mine[i : i + ROWS_PER_BATCH], pad_id)]) for i in range(0, share, ROWS_PER_BATCH)
        ]

    def measure(self, engine: Engine) -> float:
        """mean_i exp(-mean token NLL of answer i). Collective."""

        def losses(module: torch.nn.Module, micro: Any) -> torch.Tensor:
            return answer_losses(module, micro).double().cpu()

        values = torch.cat([loss for batch in self.batches for loss in engine.evaluate(batch, losses)])
        weights = torch.tensor(self.weights, dtype=torch.float64)
        total = torch.stack([((-values).exp() * weights).sum(), weights.sum()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            total = total.to(next(iter(engine.parameters())).device)
            dist.all_reduce(total)
        return float(total[0] / total[1])
