"""Private APIs of DeepSpeed: its ZeRO optimisers' partitions, and the table of ops it may compile.

The attributes are not public, so deepspeed is pinned to a minor series; `partitions_of` names any attribute that a
release has moved.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from ofmu_ray.internals.contract import Private, check_attributes

_UNREAD = "a model whose weights are still in its files"
ENGINE = Private("deepspeed.runtime.engine", "DeepSpeedEngine", _UNREAD)
STAGE_TWO = Private("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", _UNREAD)
STAGE_THREE = Private("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", _UNREAD)
ACCELERATOR = Private("deepspeed.accelerator", "get_accelerator", _UNREAD)
INIT = Private("deepspeed.runtime.zero.partition_parameters", "Init", _UNREAD)
STATUS = Private("deepspeed.runtime.zero.partition_parameters", "ZeroParamStatus", _UNREAD)
COMPATIBLE_OPS = Private("deepspeed.ops", "__compatible_ops__", "keeping DeepSpeed from compiling a C++ op on a CPU")
CONTRACT = {
    "DeepSpeedEngine": ("_broadcast_model",),
    "Init": ("_zero_init_param", "_convert_to_deepspeed_param"),
    "DeepSpeedZeroOptimizer": (
        "flatten_dense_tensors_aligned",
        "refresh_fp32_params",
        "single_partition_of_fp32_groups",
        "averaged_gradients",
        "all_grad_tensors",
        "micro_step_id",
        "bit16_groups",
        "update_lp_params",
        "zero_grad",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "create_reduce_and_remove_grad_hooks",
        "fp32_partitioned_groups_flat",
        "averaged_gradients",
        "fp16_groups",
        "persistent_parameters",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
        "invalidate_secondary_tensor",
        "zero_grad",
    ),
    "Parameter": ("ds_numel", "ds_shape", "ds_tensor", "partition", "partition_numel"),
}
"""Class -> attributes; Parameter: what stage 3 adds to each."""


def check_contract(optimizer: object) -> None:
    """Raise AssertionError with the attributes used here that this DeepSpeed release lacks."""
    name = type(optimizer).__name__
    supported = sorted(one for one in CONTRACT if one.startswith("DeepSpeedZeroOptimizer"))
    if name not in supported:
        raise AssertionError(f"deepspeed wrapped the optimiser in {name}; supported: {supported}")
    check_attributes("deepspeed", optimizer, CONTRACT[name])
    for group in getattr(optimizer, "fp16_groups", ())[:1]:
        check_attributes("deepspeed", group[0], CONTRACT["Parameter"])


def numel_of(parameter: torch.Tensor) -> int:
    """Elements of a parameter, which is empty while stage 3 holds its shares."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Shape of a parameter, which is empty while stage 3 holds its shares."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def share_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """This rank's share of a parameter, [elements with padding]; None: stage 3 did not cut it."""
    share: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return share


@contextmanager
def unread_weights(is_unread: Callable[[object], bool], read_share: Callable[[Any], None]) -> Iterator[None]:
    """Within the context DeepSpeed takes parameters that have a shape but no values, and gives no memory to them whole.

    Stages 1 and 2: the flat buffer has zeros in their places. Stage 3: a parameter is cut, then `read_share(parameter)`
    fills its `share_of`. Ranks do not exchange parameters: the others must be equal before. Gradient hooks are made
    without gathering: DeepSpeed gathers each parameter for its shape alone, and gloo needs twice its memory for that.
    """
    flatten = STAGE_TWO.get().flatten_dense_tensors_aligned
    cut = INIT.get()._zero_init_param
    make_hooks = STAGE_THREE.get().create_reduce_and_remove_grad_hooks

    def flat(
        self: Any, tensors: list[Any], alignment: int, use_cpu_data: bool = False, param_padding: Any = None
    ) -> Any:
        if use_cpu_data or not any(map(is_unread, tensors)):
            return flatten(self, tensors, alignment, use_cpu_data=use_cpu_data, param_padding=param_padding)
        padding = param_padding or [0] * len(tensors)
        numel = sum(tensor.numel() for tensor in tensors) + sum(padding)
        buffer = torch.zeros(-(-numel // alignment) * alignment, dtype=tensors[0].dtype, device=tensors[0].device)
        at = 0
        for tensor, padded in zip(tensors, padding, strict=True):
            if not is_unread(tensor):
                buffer[at : at + tensor.numel()] = tensor.detach().reshape(-1)
            at += tensor.numel() + padded
        return buffer

    def zero_init(self: Any, parameter: Any) -> None:
        if not is_unread(parameter):
            cut(self, parameter)
            return
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()
        read_share(parameter)

    def hooks(self: Any) -> None:
        unread = [parameter for group in self.fp16_groups for parameter in group if is_unread(parameter)]
        gathers = [parameter.all_gather for parameter in unread]
        for parameter in unread:
            parameter.all_gather = functools.partial(_give_shape, parameter)
        make_hooks(self)
        for parameter, gather in zip(unread, gathers, strict=True):
            parameter.all_gather = gather

    changed: list[tuple[Any, str, Any]] = [
        (ENGINE.get(), "_broadcast_model", lambda self: None),
        (STAGE_TWO.get(), "flatten_dense_tensors_aligned", flat),
        (INIT.get(), "_zero_init_param", zero_init),
        (STAGE_THREE.get(), "create_reduce_and_remove_grad_hooks", hooks),
    ]
    accelerator = ACCELERATOR.get()()
    if accelerator.device_name() == "cpu":
        changed.append((type(accelerator), "empty_cache", lambda self: _return_freed_memory()))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    try:
        for owner, name, function in changed:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _give_shape(parameter: Any) -> None:
    """Make a cut parameter look gathered, without values or memory."""
    parameter.data = torch.zeros(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.ds_shape)
    parameter.ds_status = STATUS.get().AVAILABLE


def _return_freed_memory() -> None:
    """Give freed parts of the heap back to the system: the pieces that stage 3 copied into its flat buffer (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class ZeroTwo:
    """An optimiser of stage 1 or 2: full low-precision weights, one partition of fp32 masters per rank."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def masters(self) -> list[torch.Tensor]:
        """This rank's fp32 master partitions."""
        return list(self.optimizer.single_partition_of_fp32_groups)

    def padding(self) -> list[tuple[int, int, int]]:
        """(master, start, end) of elements that belong to no parameter and may be nonzero."""
        return []  # zeros from the start, and their gradient is zero

    def parts(self, master: int) -> Iterator[tuple[Any, int, int]]:
        """(parameter, start, end) of each piece of a parameter in this rank's partition, in order."""
        size, at = self.masters()[master].numel(), 0
        begin = dist.get_rank() * size
        for parameter in self.optimizer.bit16_groups[master]:
            first, last = max(at, begin), min(at + parameter.numel(), begin + size)
            if first < last:
                yield parameter, first - begin, last - begin
            at += parameter.numel()

    def pieces(self) -> list[tuple[int, int]]:
        """(elements, elements per rank) of each equally partitioned piece, in the masters' order."""
        groups = zip(self.optimizer.bit16_groups, self.masters(), strict=True)
        return [(sum(parameter.numel() for parameter in group), master.numel()) for group, master in groups]

    def gradients(self, master: int) -> list[torch.Tensor]:
        """The averaged gradient of a master from the last backward pass: its pieces in order."""
        return list(self.optimizer.averaged_gradients[master])

    def refresh(self) -> None:
        """Copy the masters into the weights that forward passes read."""
        self.optimizer.update_lp_params()

    def adopt(self) -> None:
        """Set the masters to the weights that forward passes read (stages 1 and 2)."""
        self.optimizer.refresh_fp32_params()

    def clear(self) -> None:
        """Drop the gradients of earlier backward passes."""
        self.optimizer.zero_grad()
        for group in list(self.optimizer.averaged_gradients):
            self.optimizer.averaged_gradients[group] = None
            self.optimizer.all_grad_tensors[group] = None
        self.optimizer.micro_step_id = -1


class ZeroThree(ZeroTwo):
    """An optimiser of stage 3: weights, masters and gradients are partitioned, parameter by parameter."""

    def masters(self) -> list[torch.Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def padding(self) -> list[tuple[int, int, int]]:
        return [
            (index, start + used, start + size)
            for index in range(len(self.optimizer.fp16_groups))
            for _, start, used, size in self._places(index)
            if used < size
        ]

    def parts(self, master: int) -> Iterator[tuple[Any, int, int]]:
        for parameter, start, used, _ in self._places(master):
            if used:
                yield parameter, start, start + used

    def _places(self, master: int) -> Iterator[tuple[Any, int, int, int]]:
        """(parameter, start, elements, elements with padding) of each parameter's share in a master."""
        rank, at = dist.get_rank(), 0
        for parameter in self.optimizer.fp16_groups[master]:
            size = parameter.partition_numel()
            yield parameter, at, min(max(numel_of(parameter) - rank * size, 0), size), size
            at += size

    def pieces(self) -> list[tuple[int, int]]:
        parameters = [parameter for group in self.optimizer.fp16_groups for parameter in group]
        return [(numel_of(parameter), parameter.partition_numel()) for parameter in parameters]

    def refresh(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
        if optimizer.fp16_groups[0][0].ds_tensor.is_cuda:
            # the next pass gathers on a stream of its own, which does not wait for this one
            torch.cuda.current_stream().synchronize()

    def clear(self) -> None:
        self.optimizer.zero_grad()
        for pieces in self.optimizer.averaged_gradients.values():
            for piece in pieces or ():  # a parameter that a batch does not use would keep its old gradient
                piece.zero_()


def partitions_of(optimizer: Any) -> ZeroTwo:
    """The partitions of DeepSpeed's optimiser. Raises AssertionError like `check_contract`."""
    check_contract(optimizer)
    return ZeroThree(optimizer) if type(optimizer).__name__.endswith("Stage3") else ZeroTwo(optimizer)
