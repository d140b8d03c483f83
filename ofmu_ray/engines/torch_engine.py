"""The engine for a single process: any module, exact curvature, no process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ofmu_ray.config import OptimizerConfig, Precision
from ofmu_ray.engines.compiled import CompiledLayers
from ofmu_ray.engines.protocol import Kind, Loss, Vector, sum_and_count
from ofmu_ray.engines.shards import FlatShards
from ofmu_ray.engines.vector_engine import VectorEngine, batch_sums, micro_batches
from ofmu_ray.errors import UserError
from ofmu_ray.models.unread import UnreadWeights


class TorchEngine(VectorEngine):
    """One process, one device (the module's). `loss_fn(module, batch)` returns a mean loss or (sum, count).

    precision: fp32 (float64 modules stay float64), bf16 (bf16 weights, fp32 masters), or bf16_autocast and tf32 (fp32
    weights; bf16 autocast, or TF32 products on CUDA, in passes that enter no finite difference). offload="optimizer"
    keeps the optimiser moments in host memory between steps. decay_norms=False: no weight decay for parameters with
    fewer than two dimensions. compiled: compiles parts of the passes of `gradient`. The parameters of `module` become
    views of one buffer, into which `unread` ones are read.
    """

    offers_exact = True
    shards: FlatShards

    def __init__(
        self,
        module: torch.nn.Module,
        loss_fn: Loss | None = None,
        *,
        inner: OptimizerConfig | None = None,
        outer: OptimizerConfig | None = None,
        precision: Precision = "fp32",
        offload: str = "none",
        decay_norms: bool = True,
        unread: UnreadWeights | None = None,
        compiled: CompiledLayers | None = None,
    ) -> None:
        super().__init__(
            module,
            FlatShards(module, bf16_weights=precision == "bf16", unread=unread),
            loss_fn=loss_fn,
            inner=inner,
            outer=outer,
            precision=precision,
            offload=offload,
            decay_norms=decay_norms,
            compiled=compiled,
        )

    def parameters(self) -> list[torch.Tensor]:
        """The trainable parameters, in the order of `trainable_names`."""
        return list(self._trainable)

    def graph_gradient(
        self, batch: Any, loss: Loss | None = None, *, kind: Kind = "forget"
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Mean loss (0-dim) and its gradient per parameter, both with their graph, for double backward.

        Counts as one pass. Needs attention that supports double backward (model.attention = eager).
        """
        loss = loss or self.loss_fn
        total: torch.Tensor | None = None
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for micro in micro_batches(batch, self.device):
            value, count = sum_and_count(loss(self.module, micro))
            total = value if total is None else total + value
            sums += batch_sums(value, count, micro, self.device)
        if total is None:
            raise UserError("the batch has no micro-batches")
        _, count_all = self._account_pass(sums, kind, exact=True)
        mean = total / count_all
        gradients = torch.autograd.grad(mean, self._trainable, create_graph=True)
        return mean, list(gradients)

    def as_vector(self, tensors: Sequence[torch.Tensor]) -> Vector:
        """Per-parameter tensors, in the order of `parameters`, as a vector."""
        return self.shards.flatten(tensors)

    def as_tensors(self, vector: Vector) -> list[torch.Tensor]:
        """The inverse of `as_vector`: views of the vector, shaped like the parameters."""
        return self.shards.unflatten(vector)
