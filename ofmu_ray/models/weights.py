"""The weights of a model whose parameters may be sharded, read one tensor at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from typing import Any

import torch

from ofmu_ray.internals.deepspeed_private import shape_of, share_of

Gathered = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[object]]


class Weights:
    """Parameters and persistent buffers by the base model's names; LoRA adapters are merged into what they adapt.

    Reading is collective if `gathered` is: all ranks read the same names in the same order, and no rank has more than
    one of them complete. `keep`: this rank wants the values; the others get empty tensors.
    """

    def __init__(self, module: torch.nn.Module, gathered: Gathered, *, keep: bool):
        self._gathered, self._keep = gathered, keep
        self._layers = _lora_layers(module)
        parameters = list(module.named_parameters(remove_duplicate=False))
        self._adapters = {name: parameter for name, parameter in parameters if ".lora_" in name}
        self._parameters = {name: parameter for name, parameter in parameters if ".lora_" not in name}
        persistent = set(module.state_dict(keep_vars=True))
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        tensors: dict[str, torch.Tensor] = {**self._parameters, **self._buffers}
        self._names = {_base_name(name): name for name in tensors}
        self._tensors = tensors

    @cached_property
    def shapes(self) -> dict[str, torch.Tensor]:
        """Name -> tensor on the meta device, in the state dict's order; tied names share one."""
        made: dict[int, torch.Tensor] = {}
        for tensor in self._tensors.values():
            made.setdefault(id(tensor), torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta"))
        return {name: made[id(self._tensors[inside])] for name, inside in self._names.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy in host memory. Collective."""
        inside = self._names[name]
        if inside in self._buffers:
            return self._copy(self._buffers[inside], dtype)
        parameter, layer = self._parameters[inside], self._layers.get(inside)
        with self._gathered([parameter] if layer is None else list(layer.parameters())):
            return self._copy(parameter if layer is None or not self._keep else _merged(layer), dtype)

    def whole(self) -> dict[str, torch.Tensor] | None:
        """State dict in host memory, None unless `keep`; tied names share one tensor. Collective."""
        copies: dict[int, torch.Tensor] = {}
        for name, inside in self._names.items():
            if id(self._tensors[inside]) not in copies:
                copies[id(self._tensors[inside])] = self.read(name)
        found = {name: copies[id(self._tensors[inside])] for name, inside in self._names.items()}
        return found if self._keep else None

    def adapters(self) -> Mapping[str, torch.Tensor]:
        """LoRA's matrices alone, by the module's own names. Collective."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._adapters.items():
            with self._gathered([parameter]):
                found[name] = self._copy(parameter, None)
        return found

    def round(self, type_of: Callable[[str], torch.dtype]) -> None:
        """Round this rank's part of each weight, in place, to the type of its name. LoRA's matrices are left."""
        for name, inside in self._names.items():
            tensor = self._tensors[inside].detach()
            for held in (tensor, share_of(self._tensors[inside])):
                if held is not None:
                    held.copy_(held.to(type_of(name)))

    def _copy(self, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        return value.detach().to("cpu", dtype, copy=True) if self._keep else torch.empty(0)


def return_freed_memory() -> None:
    """Give what was freed back to the system: glibc keeps tensors below 32 MB, some 40 % of a 100 M model."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def _lora_layers(module: torch.nn.Module) -> dict[str, Any]:
    """Name of an adapted weight -> the peft layer that adapts it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(_adapted(part))]: part
        for part in module.modules()
        if hasattr(part, "get_delta_weight") and hasattr(part, "base_layer")
    }


def _adapted(layer: Any) -> torch.nn.Parameter:
    """The base model's weight; experts are adapted by nested layers, one for each of their parameters."""
    weight: torch.nn.Parameter = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    return weight


def _merged(layer: Any) -> torch.Tensor:
    base = _adapted(layer).detach()
    merged = base.float()
    for adapter in layer.active_adapters:
        merged = merged + layer.get_delta_weight(adapter).detach().float()
    return merged.to(base.dtype)


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
