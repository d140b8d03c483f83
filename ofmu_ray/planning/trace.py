"""One pass on the meta device: live bytes over time, and its operations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ofmu_ray.engines.protocol import sum_and_count

_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put)
_GROUPED = torch.ops.aten._grouped_mm.default


def _selecting(index: torch.Tensor | None) -> torch.Tensor | None:
    """A mask without content selects nothing, so the head does not run if only layers are needed."""
    if index is None or not (index.is_meta and index.dtype == torch.bool):
        return index
    return torch.zeros(index.shape, dtype=torch.bool)


def _grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """The result of a product by experts, without content: torch has none for fp32 on the meta device.

    Rows (2-D) of `left`, `right` or both are in groups that end at `ends`; a 3-D factor has one matrix per group.
    """
    if left.dim() == right.dim() == 2 and ends is not None:
        return left.new_empty(ends.shape[0], left.shape[0], right.shape[1])
    if left.dim() == 2:
        return left.new_empty(left.shape[0], right.shape[-1])
    if right.dim() == 2:
        return left.new_empty(left.shape[1], right.shape[1])
    return left.new_empty(left.shape[0], left.shape[1], right.shape[-1])


class Meter(TorchDispatchMode):
    """Live bytes of the meta tensors made by operations; FLOPs and bytes moved.

    Reading a meta tensor's content (`item`) returns 0.

    CPU tensors (labels, masks) in operations that mix both devices become meta tensors, except as an index, whose
    content determines the shape of the result.
    """

    def __init__(self, known: Iterator[torch.Tensor] | None = None, grown: Callable[[int], None] | None = None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.flops = 0.0
        self.bytes_moved = 0.0
        """Inputs and outputs of all operations except views."""
        self.operations = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known or ()}
        self._grown = grown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # transformers checks if a mask is all ones: batches usually have padding
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        meta = [tensor.is_meta for tensor in tensors]
        if any(meta) and not all(meta) and func._overloadpacket not in _INDEXING:
            args, kwargs = tree_map(
                lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
            )
        if func._overloadpacket in _INDEXING:
            args = (args[0], [_selecting(index) for index in args[1]], *args[2:])
        grouped = func is _GROUPED
        if grouped:
            out = _grouped_product(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
        else:
            out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
        new = sum(self._count(tensor) for tensor in made)
        if new and self._grown is not None:
            self._grown(self.live)
        if made and not func.is_view:
            self.operations += 1
            self.bytes_moved += sum(t.numel() * t.element_size() for t in (*tensors, *made) if t.is_meta)
        if grouped:  # each row of the 2-D factor meets one expert
            left, right = args[:2]
            self.flops += 2 * (left.numel() * right.shape[-1] if left.dim() == 2 else right.numel() * left.shape[-2])
        elif func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out

    def _count(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return 0
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._gone, key)
        return storage.nbytes()

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class MemoryPoint:
    """A Pareto-optimal moment of a pass in both numbers."""

    activation_bytes: int
    """Activations, logits, saved tensors and unfinished gradients; not weights or finished gradients."""
    gradients_done: int
    """Elements of finished parameter gradients."""


@dataclass(frozen=True)
class PassTrace:
    """One forward and backward pass over one micro-batch."""

    moments: tuple[MemoryPoint, ...]
    """By decreasing activation_bytes and increasing gradients_done."""
    forward_bytes: int
    """Peak activation bytes before backward."""
    logits_bytes: int
    """Bytes of the logits of tokens with a loss, times their number of live copies."""
    flops: float
    """FLOPs of matrix products and attention, forward and backward."""
    bytes_moved: float
    operations: int
    precision: str
    """What its matrix products run in: model.precision, or fp32 in a pass that enters a difference."""

    @property
    def peak_bytes(self) -> int:
        return max(moment.activation_bytes for moment in self.moments)


class _Attention(torch.autograd.Function):
    """Memory and FLOPs of a fused attention kernel: scores are never stored, backward recomputes them."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meter: Meter) -> torch.Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        meter.flops += _Attention.products(q, k, v, 1)
        ctx.meter = meter
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        ctx.meter.flops += _Attention.products(q, k, v, 2.5)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None

    @staticmethod
    def products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, times: float) -> float:
        return times * 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


@contextmanager
def _fused_attention(meter: Meter) -> Iterator[None]:
    """Trace attention as one kernel, as on CPU and CUDA; the meta device would decompose it."""
    original = functional.scaled_dot_product_attention

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        return _Attention.apply(q, k, v, meter)  # type: ignore[no-untyped-call]

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """peft turns autocast off on its weights' device, and torch has none for the meta device."""
    original = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return original("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast = autocast  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


def trace_pass(
    module: torch.nn.Module, loss: Callable[..., Any], micro: Mapping[str, Any], precision: str
) -> PassTrace:
    """Run `loss` forward and backward on a module on the meta device, without memory or computation.

    `micro`: a micro-batch of `shapes.micro_batch`.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    known = [*module.parameters(), *(p.grad for p in parameters if p.grad is not None), *module.buffers()]
    moments: dict[int, int] = {}
    done = 0

    def grown(live: int) -> None:
        moments[done] = max(moments.get(done, 0), live)

    def finished(parameter: torch.Tensor) -> None:
        nonlocal done
        done += parameter.numel()
        grown(meter.live)

    meter = Meter(iter(known), grown)
    hooks = [
        parameter.register_post_accumulate_grad_hook(finished)  # type: ignore[no-untyped-call]
        for parameter in parameters
    ]
    try:
        with meter, _fused_attention(meter), _autocast_on_meta():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
                value, count = sum_and_count(loss(module, micro))
            grown(meter.live)
            forward, logits = max(moments.values()), _logits_bytes(module, micro)
            value.backward()  # type: ignore[no-untyped-call]
            grown(meter.live)
            del value, count
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None
    kept: list[MemoryPoint] = []
    for elements, live in sorted(moments.items(), reverse=True):
        if not kept or live > kept[-1].activation_bytes:
            kept.append(MemoryPoint(live, elements))
    return PassTrace(
        tuple(reversed(kept)), forward, logits, meter.flops, meter.bytes_moved, meter.operations, precision
    )


def _logits_bytes(module: Any, micro: Mapping[str, Any]) -> int:
    config = getattr(module, "config", None)
    vocabulary = getattr(config, "vocab_size", 0)
    return int((micro["labels"] >= 0).sum()) * int(vocabulary) * 4 * 3  # logits, log-probabilities, their gradient
