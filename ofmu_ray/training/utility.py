"""The utility watched during a run: mean answer probability on a fixed sample of retain rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ofmu_ray.data.batches import collate
from ofmu_ray.data.sidecar import read_rows
from ofmu_ray.engines.language import IGNORED
from ofmu_ray.engines.protocol import Batch, Engine

ROWS_PER_BATCH = 16


class UtilityProbe:
    """Holds this rank's share of the sample; every rank runs the same number of batches (ZeRO-3 is collective)."""

    def __init__(self, rows_path: str, rank: int, world: int, pad_id: int):
        rows = read_rows(rows_path).to_pylist()
        share = -(-len(rows) // world)
        mine = rows[rank * share : (rank + 1) * share]
        self.weights = [1.0] * len(mine) + [0.0] * (share - len(mine))
        mine += [rows[0]] * (share - len(mine))
        self.batches = []
        for start in range(0, share, ROWS_PER_BATCH):
            self.batches.append(Batch(micro=[collate(mine[start : start + ROWS_PER_BATCH], pad_id)]))

    def measure(self, engine: Engine) -> float:
        """mean_i exp(-mean token NLL of answer i). Collective."""

        values = torch.cat([loss for batch in self.batches for loss in engine.evaluate(batch, answer_losses)])
        weights = torch.tensor(self.weights, dtype=torch.float64)
        total = torch.stack([((-values).exp() * weights).sum(), weights.sum()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            total = total.to(engine.device)
            dist.all_reduce(total)
        return float(total[0] / total[1])


def answer_losses(module: torch.nn.Module, micro: Any) -> torch.Tensor:
    """Mean token NLL of each row's answer, EOS included, float64 [rows] on the CPU."""
    device = next(module.parameters()).device
    ids, mask, labels = (micro[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
    logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    losses: torch.Tensor = nll.sum(1) / (targets != IGNORED).sum(1)
    return losses.double().cpu()
