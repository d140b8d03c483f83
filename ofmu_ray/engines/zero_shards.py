"""DeepSpeed's ZeRO partitions as `Shards`.

DeepSpeed computes sharded gradients and keeps the weights that forward passes read. Our optimisers step on its fp32
master partitions; its optimiser never steps. `internals/deepspeed_private.py` accesses DeepSpeed's private parts.

Each micro-batch is a separate accumulation boundary: its reduced gradient shard is added to an fp32 vector here, and
DeepSpeed's gradients are cleared. So nothing depends on when DeepSpeed clears or accumulates (which differs by stage),
and sums are fp32 in every precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from ofmu_ray.engines.protocol import Vector
from ofmu_ray.engines.shards import Shards, trainable_parameters
from ofmu_ray.internals.deepspeed_private import numel_of, partitions_of


class ZeroShards(Shards):
    """Stages 1, 2 and 3. `engine` is a deepspeed.DeepSpeedEngine on an initialised process group."""

    sharded = True

    def __init__(self, engine: Any, stage: int) -> None:
        self._partitions = partitions_of(engine.optimizer)
        self.forward_module = engine
        self.world_size = dist.get_world_size()
        self._engine, self._stage = engine, stage
        self.masters = [partition.data for partition in self._partitions.masters()]
        self._padding = self._partitions.padding()
        for index, start, end in self._padding:  # uninitialised at stage 3: norms would count it
            self.masters[index][start:end].zero_()
        self._sums: Vector = []
        total = sum(numel_of(parameter) for _, parameter in trainable_parameters(engine.module))
        self.layout = {
            "layout": f"zero_stage {stage}",
            "workers": self.world_size,
            "rank": dist.get_rank(),
            "numel": total,
            "shards": [master.numel() for master in self.masters],
            "pieces": self._partitions.pieces(),
        }

    def adopt(self) -> None:
        """Set the masters to the weights, which were read after DeepSpeed had started (stages 1 and 2)."""
        self._partitions.adopt()

    def clear_gradients(self) -> None:
        self._partitions.clear()
        self._sums = []

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss)
        with torch.no_grad():
            if not self._sums:
                self._sums = [torch.zeros_like(master) for master in self.masters]
            for index, total in enumerate(self._sums):
                offset = 0
                for piece in self._partitions.gradients(index):
                    total[offset : offset + piece.numel()].add_(piece.reshape(-1))
                    offset += piece.numel()
            self._partitions.clear()

    @torch.no_grad()
    def gradient_sums(self, scale: float) -> Vector:
        sums, self._sums = self._sums, []
        torch._foreach_mul_(sums, scale * self.world_size)  # DeepSpeed averages over ranks; this is a sum
        for index, start, end in self._padding:
            sums[index][start:end].zero_()
        return sums

    def parts(self, master: int) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        yield from self._partitions.parts(master)

    @torch.no_grad()
    def refresh(self) -> None:
        self._partitions.refresh()

    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[object]:
        if self._stage < 3:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(parameters))
        return gathered
