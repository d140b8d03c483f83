"""A model's master weights and gradients as flat tensors: `Shards`, and its replicated form.

`Shards` hides a parallel layout from the engine. Its masters are this rank's part of the parameters in full precision
(fp32; float64 for a float64 module). Forward passes see changes after `refresh`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from ofmu_ray.engines.protocol import Vector
from ofmu_ray.errors import UserError
from ofmu_ray.internals.deepspeed_private import shape_of
from ofmu_ray.models.unread import UnreadWeights


class Shards(ABC):
    """One layout of master weights and gradients."""

    masters: Vector
    """Flat master weights of this rank; their storage never moves."""
    sharded: bool
    """Whether ranks have different elements (otherwise every rank has all of them)."""
    world_size: int
    forward_module: torch.nn.Module
    """The module for a loss to call."""
    layout: dict[str, object]
    """Must be equal for a saved state to fit."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the masters into the weights that forward passes read. Collective if sharded."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Drop all gradients of earlier passes."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of one micro-batch's loss; adds its gradient to those since `clear_gradients`."""

    @abstractmethod
    def gradient_sums(self, scale: float) -> Vector:
        """`scale` times the gradient summed over ranks and micro-batches since `clear_gradients`, in new tensors."""

    @abstractmethod
    def parts(self, master: int) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        """(parameter, start, end) of each piece of a parameter in a master, in order."""

    def matrices(self) -> list[torch.Tensor]:
        """Views of the masters' elements that belong to parameters of two and more dimensions; neighbours are one."""
        views = []
        for index, master in enumerate(self.masters):
            begin = end = 0
            for parameter, first, last in self.parts(index):
                if len(shape_of(parameter)) < 2:
                    continue
                if first != end:
                    views.append(master[begin:end])
                    begin = first
                end = last
            views.append(master[begin:end])
        return [view for view in views if view.numel()]

    @abstractmethod
    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[object]:
        """Within the context the parameters are complete (for reading)."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def trainable_parameters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of all trainable parameters; a tied parameter occurs once, under its first name."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        raise UserError("the model has no trainable parameters: all are frozen; relax model.freeze")
    return named


def trains_adapters(module: torch.nn.Module) -> bool:
    """Whether LoRA adapters are trained (then nothing else is). They stay fp32 beside bf16 weights."""
    return all(".lora_" in name for name, _ in trainable_parameters(module))


def fill_frozen(module: torch.nn.Module, unread: UnreadWeights | None) -> None:
    """Read the frozen parameters, which no flat buffer holds."""
    for parameter in module.parameters():
        if unread is not None and parameter in unread and not parameter.requires_grad:
            unread.fill(parameter)


class FlatShards(Shards):
    """Every rank has the complete model: one contiguous buffer of weights and one of gradients.

    Parameters and gradients are views of the buffers, so a displacement, a dot product or an optimiser step is one
    kernel over the complete model. With more than one rank this is plain data parallelism (ZeRO stage 0): one
    all-reduce of the gradient buffer per batch. There is never a second copy of the weights: the buffer takes them over
    parameter by parameter, from the module or, for `unread` ones, from the model's files.
    """

    sharded = False

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        bf16_weights: bool = False,
        world_size: int = 1,
        unread: UnreadWeights | None = None,
    ) -> None:
        self.forward_module = module
        self.world_size = world_size
        parameters = [parameter for _, parameter in trainable_parameters(module)]
        devices = {parameter.device for parameter in parameters}
        if len(devices) > 1:
            raise UserError(f"the model is spread over {sorted(map(str, devices))}: move it to one device")
        exact = all(parameter.dtype == torch.float64 for parameter in parameters)
        full = torch.float64 if exact else torch.float32
        dtype = torch.bfloat16 if bf16_weights else full
        rounded = bf16_weights and not trains_adapters(module)
        trained = dtype if rounded else full
        fill_frozen(module, unread)
        for parameter in module.parameters():  # frozen ones; buffers (rotary frequencies) keep their precision
            if parameter.is_floating_point() and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        sizes = [parameter.numel() for parameter in parameters]
        weights = torch.empty(sum(sizes), dtype=trained, device=parameters[0].device)
        for parameter, view in zip(parameters, torch.split(weights, sizes), strict=True):
            if unread is not None and parameter in unread:
                unread.read(parameter, view)
            else:
                view.copy_(parameter.detach().reshape(-1))
            parameter.data = view.view(parameter.shape)  # frees what it had
        if world_size > 1:
            dist.broadcast(weights, src=0)
        master = weights.float() if rounded else weights
        self.masters = [master]
        self._weights = weights
        self._parameters = parameters
        self._sizes = sizes
        self._gradients = torch.zeros_like(weights)
        self._accumulated = torch.zeros_like(master) if rounded else self._gradients
        self._bind_views()
        self.layout = {"layout": "replicated", "numel": master.numel(), "dtype": str(full)}

    def _bind_views(self) -> None:
        weights, gradients = (torch.split(flat, self._sizes) for flat in (self._weights, self._gradients))
        for parameter, weight, gradient in zip(self._parameters, weights, gradients, strict=True):
            parameter.data = weight.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)

    @torch.no_grad()
    def refresh(self) -> None:
        if self._weights is not self.masters[0]:
            self._weights.copy_(self.masters[0])

    @torch.no_grad()
    def clear_gradients(self) -> None:
        self._accumulated.zero_()
        if self._gradients is not self._accumulated:
            self._gradients.zero_()
        offset = self._gradients.data_ptr()
        for parameter, size in zip(self._parameters, self._sizes, strict=True):
            # somebody called module.zero_grad() (set_to_none), which breaks the view: bind it again
            if parameter.grad is None or parameter.grad.data_ptr() != offset:
                self._bind_views()
                break
            offset += size * self._gradients.element_size()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if self._accumulated is not self._gradients:  # bf16 weights: micro-batches add up in fp32
            self._accumulated.add_(self._gradients)
            self._gradients.zero_()

    @torch.no_grad()
    def gradient_sums(self, scale: float) -> Vector:
        return [self._accumulated * scale] if self.world_size == 1 else [self.all_reduce(self._accumulated * scale)]

    def parts(self, master: int) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        at = 0
        for parameter, size in zip(self._parameters, self._sizes, strict=True):
            yield parameter, at, at + size
            at += size

    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[object]:
        return nullcontext()

    def flatten(self, tensors: Sequence[torch.Tensor]) -> Vector:
        """Per-parameter tensors, in `trainable_parameters` order, as a vector."""
        return [torch.cat([tensor.detach().reshape(-1).to(self.masters[0].dtype) for tensor in tensors])]

    def unflatten(self, vector: Vector) -> list[torch.Tensor]:
        """The inverse of `flatten`, as views."""
        parts = torch.split(vector[0], self._sizes)
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]
