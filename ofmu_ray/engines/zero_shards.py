"""DeepSpeed's ZeRO partitions as `Shards`: the only module that reads DeepSpeed's private attributes.

DeepSpeed computes sharded gradients and keeps the weights that forward passes read; our optimisers step on its fp32
master partitions, and its own optimiser step is never used. The attributes below are not public API, so deepspeed is
pinned to a minor series and `check_contract` names whatever a new release has moved.

Each micro-batch is an accumulation boundary of its own: its reduced gradient shard is added to an fp32 vector here
and DeepSpeed's gradients are cleared, so that nothing hinges on when DeepSpeed clears or accumulates (which
differs by stage), and sums are fp32 in every precision.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from ofmu_ray.engines.protocol import Vector
from ofmu_ray.engines.shards import Shards, trainable_parameters

_CONTRACT = {
    "DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups",
        "averaged_gradients",
        "all_grad_tensors",
        "micro_step_id",
        "bit16_groups",
        "update_lp_params",
        "zero_grad",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat",
        "averaged_gradients",
        "fp16_groups",
        "persistent_parameters",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
        "invalidate_secondary_tensor",
        "zero_grad",
    ),
}


def check_contract(optimizer: object) -> None:
    """AssertionError naming what this DeepSpeed release lacks of the attributes that this module reads."""
    name = type(optimizer).__name__
    if name not in _CONTRACT:
        raise AssertionError(f"deepspeed wrapped the optimiser in {name}; known are {sorted(_CONTRACT)}")
    missing = [attribute for attribute in _CONTRACT[name] if not hasattr(optimizer, attribute)]
    if missing:
        import deepspeed

        raise AssertionError(f"deepspeed {deepspeed.__version__}: {name} has no {', '.join(missing)} any more")


class ZeroShards(Shards):
    """What stages 1, 2 and 3 share. `engine` is a deepspeed.DeepSpeedEngine on an initialised process group."""

    sharded = True

    def __init__(self, engine: Any, stage: int) -> None:
        check_contract(engine.optimizer)
        self.forward_module = engine
        self.world_size = dist.get_world_size()
        self._engine, self._optimizer = engine, engine.optimizer
        self.masters = [partition.data for partition in self._partitions()]
        self._padding = self._padding_slices()
        for index, start, end in self._padding:  # DeepSpeed leaves it uninitialised at stage 3: norms would count it
            self.masters[index][start:end].zero_()
        self._sums: Vector = []
        total = sum(getattr(p, "ds_numel", p.numel()) for _, p in trainable_parameters(engine.module))
        self.layout = {
            "layout": f"zero_stage {stage}",
            "workers": self.world_size,
            "rank": dist.get_rank(),
            "numel": total,
            "shards": [master.numel() for master in self.masters],
            "pieces": self._pieces(),
        }

    @abstractmethod
    def _partitions(self) -> list[torch.Tensor]:
        """This rank's fp32 master partitions."""

    @abstractmethod
    def _padding_slices(self) -> list[tuple[int, int, int]]:
        """(master, start, end) of elements that belong to no parameter."""

    @abstractmethod
    def _pieces(self) -> list[tuple[int, int]]:
        """(elements, elements of a rank's share) of what is cut into equal shares, in the masters' order."""

    def _slots(self) -> list[list[torch.Tensor]]:
        """The averaged gradient of the last backward pass: per master, its pieces in order."""
        return [list(self._optimizer.averaged_gradients[index]) for index in range(len(self.masters))]

    @abstractmethod
    def _clear_deepspeed(self) -> None:
        """Forget the gradients of earlier backward passes."""

    def clear_gradients(self) -> None:
        self._clear_deepspeed()
        self._sums = []

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss)
        with torch.no_grad():
            if not self._sums:
                self._sums = [torch.zeros_like(master) for master in self.masters]
            for total, pieces in zip(self._sums, self._slots(), strict=True):
                offset = 0
                for piece in pieces:
                    total[offset : offset + piece.numel()].add_(piece.reshape(-1))
                    offset += piece.numel()
            self._clear_deepspeed()

    @torch.no_grad()
    def gradient_sums(self, scale: float) -> Vector:
        sums, self._sums = self._sums, []
        torch._foreach_mul_(sums, scale * self.world_size)  # DeepSpeed averages over the ranks; this is a sum
        for index, start, end in self._padding:
            sums[index][start:end].zero_()
        return sums

    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[object]:
        return nullcontext()


class ZeroOneTwoShards(ZeroShards):
    """Stages 1 and 2: whole low-precision weights, one partition of fp32 masters and of the gradient per rank."""

    def _partitions(self) -> list[torch.Tensor]:
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _padding_slices(self) -> list[tuple[int, int, int]]:
        return []  # zeros from the start, and their gradient is zero

    def _pieces(self) -> list[tuple[int, int]]:
        groups = zip(self._optimizer.bit16_groups, self.masters, strict=True)
        return [(sum(parameter.numel() for parameter in group), master.numel()) for group, master in groups]

    @torch.no_grad()
    def refresh(self) -> None:
        self._optimizer.update_lp_params()

    def _clear_deepspeed(self) -> None:
        self._optimizer.zero_grad()
        for group in list(self._optimizer.averaged_gradients):
            self._optimizer.averaged_gradients[group] = None
            self._optimizer.all_grad_tensors[group] = None
        self._optimizer.micro_step_id = -1


class ZeroThreeShards(ZeroShards):
    """Stage 3: weights, masters and gradients are partitioned, parameter by parameter."""

    def _partitions(self) -> list[torch.Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def _padding_slices(self) -> list[tuple[int, int, int]]:
        rank = dist.get_rank()
        slices = []
        for index, group in enumerate(self._optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                size = parameter.partition_numel()
                used = min(max(parameter.ds_numel - rank * size, 0), size)
                if used < size:
                    slices.append((index, offset + used, offset + size))
                offset += size
        return slices

    def _pieces(self) -> list[tuple[int, int]]:
        parameters = [parameter for group in self._optimizer.fp16_groups for parameter in group]
        return [(parameter.ds_numel, parameter.partition_numel()) for parameter in parameters]

    @torch.no_grad()
    def refresh(self) -> None:
        optimizer = self._optimizer
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    def _clear_deepspeed(self) -> None:
        self._optimizer.zero_grad()
        for pieces in self._optimizer.averaged_gradients.values():
            for piece in pieces or ():  # a parameter that a batch does not use would keep its old gradient
                piece.zero_()

    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[object]:
        import deepspeed

        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(parameters))
        return gathered
