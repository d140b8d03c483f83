"""Common base of the engines: passes over a batch, displacement, linear algebra, optimiser steps and state.

`Shards` hides the layout of the weights (one buffer, or DeepSpeed's ZeRO partitions) from this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from ofmu_ray.config import OptimizerConfig
from ofmu_ray.engines.compiled import CompiledLayers
from ofmu_ray.engines.loop_optimizer import LoopOptimizer
from ofmu_ray.engines.products import fp32_products
from ofmu_ray.engines.protocol import Batch, Kind, Loop, Loss, PassAccount, Vector, sum_and_count
from ofmu_ray.engines.shards import Shards, trainable_parameters
from ofmu_ray.errors import UserError
from ofmu_ray.internals.deepspeed_private import numel_of
from ofmu_ray.models.answers import causal_lm_loss
from ofmu_ray.models.loading import disable_dropout
from ofmu_ray.models.weights import Weights

T = TypeVar("T")

# elements that a dot product converts to float64 at a time: fits in a CPU's cache; few launches on a GPU
_DOT_CHUNK = {False: 1 << 15, True: 1 << 24}
_FLOPS_PER_TOKEN = 6  # per token and parameter: 2 forward, 4 backward


class VectorEngine:
    """One model, its trainable parameters as a vector, and one optimiser per loop.

    Dropout is disabled: a finite difference needs the same function twice. Passes inside `displaced` do not change
    buffers (running statistics).
    """

    offers_exact: bool = False

    def __init__(
        self,
        module: torch.nn.Module,
        shards: Shards,
        *,
        loss_fn: Loss | None,
        inner: OptimizerConfig | None,
        outer: OptimizerConfig | None,
        precision: str,
        offload: str,
        decay_norms: bool,
        compiled: CompiledLayers | None,
    ) -> None:
        disable_dropout(module)
        self.module = module
        self.precision = precision
        self.mixed = precision in ("bf16_autocast", "tf32")
        self.loss_fn: Loss = loss_fn or causal_lm_loss
        self.account = PassAccount()
        self.kept: dict[str, Vector] = {}
        self._compiled: AbstractContextManager[object] = compiled or nullcontext()
        self.shards = shards
        named = trainable_parameters(module)
        self.trainable_names = [name for name, _ in named]
        self._trainable = [parameter for _, parameter in named]
        self.numel = sum(numel_of(parameter) for parameter in self._trainable)
        """Number of trainable parameters of the complete model."""
        self._numel_all = sum(numel_of(parameter) for parameter in module.parameters())
        offloaded = offload == "optimizer"
        decayed = None if decay_norms else shards.matrices()
        plain = OptimizerConfig()
        first = LoopOptimizer(shards.masters, inner or plain, offload=offloaded, decayed=decayed)
        second = LoopOptimizer(shards.masters, outer or plain, offload=offloaded, beside=first, decayed=decayed)
        self._optimizers: dict[Loop, LoopOptimizer] = {"inner": first, "outer": second}
        self._displacements: list[tuple[Vector, float]] = []
        self._saved: Vector | None = None
        self._saved_is_current = False
        # masks (bool) never change; running statistics do, and batch norm does not bump their version counter
        self._buffers = [buffer for buffer in module.buffers() if buffer.dtype != torch.bool]
        self._gradients_checked = False

    @property
    def device(self) -> torch.device:
        """Device of the masters and batches."""
        return self.shards.masters[0].device

    # ------------------------------------------------------------------------------------------------ passes

    def gradient(
        self,
        batch: Any,
        loss: Loss | None = None,
        *,
        kind: Kind = "forget",
        differenced: bool = False,
        work: float = 1.0,
    ) -> tuple[Vector, float]:
        """Gradient and value of the mean loss over the global batch; see `protocol.Engine.gradient`.

        Every rank must pass the same number of micro-batches. `differenced`: the pass enters a finite difference, so
        bf16_autocast and tf32 run it in fp32 (like every pass inside `displaced`).

        Raises UserError if no token of the global batch has a loss, and on the first pass if a trainable parameter gets
        no gradient.
        """
        loss = loss or self.loss_fn
        shards = self.shards
        shards.clear_gradients()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, count, tokens
        exact = differenced or bool(self._displacements)
        with self._every_gradient_arrives(), fp32_products(self.precision, exact=exact), self._compiled:
            for micro in micro_batches(batch, self.device):
                with self._autocast(not exact):
                    value, count = sum_and_count(loss(shards.forward_module, micro))
                shards.backward(value)
                sums += batch_sums(value, count, micro, self.device)
        loss_sum, total = self._account_pass(shards.all_reduce(sums), kind, exact=exact, work=work)
        return shards.gradient_sums(1.0 / total), loss_sum / total

    def _account_pass(self, sums: torch.Tensor, kind: Kind, *, exact: bool, work: float = 1.0) -> tuple[float, float]:
        loss_sum, total, tokens = sums.tolist()
        if not total:
            raise UserError(
                "no token of this batch has a loss: all labels are masked (are there rows without an answer?)"
            )
        self.account.gradient_passes[kind] = self.account.gradient_passes.get(kind, 0) + 1
        precision = "fp32" if self.mixed and exact else self.precision.removesuffix("_autocast")
        self.account.precisions[precision] = self.account.precisions.get(precision, 0) + 1
        self.account.tokens += int(tokens)
        self.account.flops += _FLOPS_PER_TOKEN * self._numel_all * tokens * work
        return loss_sum, total

    def evaluate(self, batch: Any, fn: Callable[[torch.nn.Module, Any], T]) -> list[T]:
        """`fn(module, micro_batch)` for each micro-batch, without gradients and in evaluation mode.

        Collective if the weights are sharded (ZeRO-3): every rank must pass the same number of micro-batches.
        """
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad(), fp32_products(self.precision, exact=False), self._autocast(True):
                return [fn(self.shards.forward_module, micro) for micro in micro_batches(batch, self.device)]
        finally:
            self.module.train(training)

    @contextmanager
    def reading(self, *, autocast: bool = False) -> Iterator[torch.nn.Module]:
        """The model, to be called without gradients, in evaluation mode and with its weights' own precision.

        `autocast`: in bf16 if the precision is bf16_autocast. At ZeRO-3 each of its passes is collective.
        """
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad(), fp32_products(self.precision, exact=True), self._autocast(autocast):
                yield self.module
        finally:
            self.module.train(training)

    @contextmanager
    def _autocast(self, wanted: bool) -> Iterator[None]:
        enabled = wanted and self.precision == "bf16_autocast"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            yield

    @contextmanager
    def _every_gradient_arrives(self) -> Iterator[None]:
        """On the first pass, check that each trainable parameter gets a gradient on some rank."""
        if self._gradients_checked:
            yield
            return
        arrived = torch.zeros(len(self._trainable), device=self.device)
        hooks = [
            parameter.register_hook(  # type: ignore[no-untyped-call]
                lambda _, index=index: arrived[index].fill_(1) and None
            )
            for index, parameter in enumerate(self._trainable)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        flags = self.shards.all_reduce(arrived).tolist()
        missing = [name for name, flag in zip(self.trainable_names, flags, strict=True) if not flag]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise UserError(
                f"{len(missing)} trainable parameter(s) got no gradient from the first batch: {shown}. The loss does "
                "not depend on them; freeze them (model.freeze) or train others"
            )
        self._gradients_checked = True

    # ------------------------------------------------------------------------------- parameters as a vector

    @contextmanager
    def displaced(self, vector: Vector, step: float) -> Iterator[None]:
        """Within the context the parameters are theta + step * vector; afterwards theta again, bit for bit. Nests.

        One copy of theta serves all displacements until a step or a load changes theta; its memory is reused.
        """
        masters = self.shards.masters
        if self._saved is None:
            self._saved = [master.clone() for master in masters]
        elif not self._saved_is_current:
            torch._foreach_copy_(self._saved, masters)
        self._saved_is_current = True
        statistics = [buffer.clone() for buffer in self._buffers]
        self._displacements.append((vector, float(step)))
        try:
            self._move(masters if len(self._displacements) > 1 else self._saved, vector, step)
            self.shards.refresh()
            yield
        finally:
            self._displacements.pop()
            # not "minus the step", because of rounding; instead, replay the outer displacements on the copy
            base = self._saved
            for outer_vector, outer_step in self._displacements:
                self._move(base, outer_vector, outer_step)
                base = masters
            if not self._displacements:
                for master, saved in zip(masters, self._saved, strict=True):
                    master.copy_(saved)
            self.shards.refresh()
            self._restore_buffers(statistics)

    @torch.no_grad()
    def _move(self, base: Vector, vector: Vector, step: float) -> None:
        for master, start, direction in zip(self.shards.masters, base, vector, strict=True):
            torch.add(start, direction, alpha=step, out=master)

    @torch.no_grad()
    def _restore_buffers(self, saved: Sequence[torch.Tensor]) -> None:
        for buffer, value in zip(self._buffers, saved, strict=True):
            buffer.copy_(value)

    def apply(self, vector: Vector, loop: Loop) -> float:
        """One step of the loop's optimiser down `vector`, which it consumes; returns its norm before clipping.

        A vector whose norm is not finite changes nothing; the caller sees it in the returned norm.
        """
        if self._displacements:
            raise AssertionError("apply() inside displaced(): leaving it would undo the step")
        norm = math.sqrt(self.dot((vector, vector))[0])
        if math.isfinite(norm):
            self._saved_is_current = False
            self._optimizers[loop].step(vector, norm)
            self.shards.refresh()
            self.account.updates += 1
        return norm

    def first_moment(self, loop: Loop) -> Vector | None:
        """AdamW's running mean of the loop's gradients; None before its first step. Read-only."""
        return self._optimizers[loop].first_moment()

    @torch.no_grad()
    def dot(self, *pairs: tuple[Vector, Vector]) -> list[float]:
        """Inner products over all ranks in float64, with one all-reduce for all pairs."""
        sums = _local_dots(pairs)
        if self.shards.sharded:
            self.shards.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def parameters_norm(self) -> float:
        """|theta| of the trainable parameters."""
        return math.sqrt(self.dot((self.shards.masters, self.shards.masters))[0])

    def weights(self) -> Vector:
        """A copy of theta (masters, this rank's shard)."""
        return [master.clone() for master in self.shards.masters]

    def set_learning_rate(self, loop: Loop, lr: float) -> None:
        """Learning rate of the loop's next steps."""
        self._optimizers[loop].lr = lr

    def scale_learning_rates(self, factor: float) -> None:
        """From now on, every step uses `factor` times its learning rate."""
        for optimizer in self._optimizers.values():
            optimizer.factor = factor

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of all state, as copies in host memory, for torch.save."""
        return {
            "layout": dict(self.shards.layout),
            "masters": [master.detach().to("cpu", copy=True) for master in self.shards.masters],
            "optimizers": {loop: optimizer.state_dict() for loop, optimizer in self._optimizers.items()},
            "buffers": [buffer.detach().to("cpu", copy=True) for buffer in self._buffers],
            "account": self.account.state(),
            "kept": {name: [part.to("cpu", copy=True) for part in vector] for name, vector in self.kept.items()},
        }

    @property
    def layout(self) -> Mapping[str, Any]:
        """The layout of vectors on the ranks (Shards.layout)."""
        return self.shards.layout

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict` of the same rank, bit for bit. Collective. UserError if the layout differs."""
        if self._displacements:
            raise AssertionError("load_state_dict() inside displaced()")
        saved_layout, own_layout = state["layout"], self.shards.layout
        if saved_layout != own_layout:
            raise UserError(
                f"the checkpoint was written by {_describe(saved_layout)}, this run is {_describe(own_layout)}: "
                "resume with the same training.engine, training.zero_stage and model"
            )
        self._saved_is_current = False
        with torch.no_grad():
            for master, saved in zip(self.shards.masters, state["masters"], strict=True):
                master.copy_(saved)
        for loop, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][loop])
        self._restore_buffers(state["buffers"])
        # older checkpoints have no kept vectors
        for name, vector in state.get("kept", {}).items():
            self.kept[name] = [part.to(self.device, copy=True) for part in vector]
        self.account.load(state["account"])
        self.shards.refresh()

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """State dict of the complete model on rank 0 (host memory, LoRA merged into the base); None on other ranks.

        Collective: sharded parameters are gathered one at a time.
        """
        return self.readable_weights().whole()

    def readable_weights(self) -> Weights:
        """The complete model, to be read on rank 0 tensor by tensor."""
        return Weights(self.module, self.shards.gathered, keep=self._rank() == 0)

    def _rank(self) -> int:
        return torch.distributed.get_rank() if self.shards.world_size > 1 else 0


def micro_batches(batch: Any, device: torch.device) -> Iterator[Any]:
    """The micro-batches of a batch, moved to `device` one at a time."""
    for micro in batch.micro if isinstance(batch, Batch) else [batch]:
        yield _on(micro, device)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _on(item, device) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_on(item, device) for item in value)
    return value


def batch_sums(value: torch.Tensor, count: Any, micro: Any, device: torch.device) -> torch.Tensor:
    """float64 [loss, count, tokens]. Tokens are those of all attention masks in the micro-batch, so a method must pass
    only the texts that its loss runs; without a mask, tokens is the count."""
    items = micro.items() if isinstance(micro, Mapping) else ()
    masks = [mask for name, mask in items if name.endswith("attention_mask")]
    tokens = sum(mask.sum() for mask in masks) if masks else count
    parts = (torch.as_tensor(part, dtype=torch.float64, device=device) for part in (value.detach(), count, tokens))
    return torch.stack(list(parts))


def _local_dots(pairs: Sequence[tuple[Vector, Vector]]) -> torch.Tensor:
    """Inner products of this rank's shards; each piece of a vector is converted to float64 once for all pairs."""
    vectors = {id(vector): vector for pair in pairs for vector in pair}
    first = next(iter(vectors.values()))
    chunk = _DOT_CHUNK[first[0].is_cuda]
    totals = torch.zeros(len(pairs), dtype=torch.float64, device=first[0].device)
    for index, shard in enumerate(first):
        for start in range(0, shard.numel(), chunk):
            wide = {key: vector[index][start : start + chunk].double() for key, vector in vectors.items()}
            totals += torch.stack([torch.dot(wide[id(a)], wide[id(b)]) for a, b in pairs])
    return totals


def _describe(layout: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in layout.items())
