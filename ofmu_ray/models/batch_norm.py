"""Batch normalisation that does not depend on how a batch is cut into micro-batches and workers.

Unlearning: running statistics are fixed, so that a loss is a sum over rows and a finite difference is one of the same
function. Training: statistics are those of all workers' rows; torch's own SyncBatchNorm runs on GPUs only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from ofmu_ray.errors import UserError


class FixedStatistics(torch.nn.BatchNorm2d):
    """Normalises by its running statistics in training mode, too, and does not update them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class SharedStatistics(torch.nn.BatchNorm2d):
    """Normalises by the mean and variance over the rows of all workers. Collective in training mode."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce

        count = input.numel() // input.shape[1] * dist.get_world_size()
        assert self.running_mean is not None
        assert self.running_var is not None
        wide = input.float()
        sums = torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
        mean, square = all_reduce(sums) / count  # type: ignore[no-untyped-call]
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        normal: torch.Tensor = wide * scale[:, None, None] + shift[:, None, None]
        return normal.to(input.dtype)


def fix_statistics(module: torch.nn.Module) -> None:
    """Fix the running statistics of all batch normalisations. Raises UserError for others than BatchNorm2d."""
    _become(module, FixedStatistics)


def share_statistics(module: torch.nn.Module) -> None:
    """Let all batch normalisations use statistics over all workers. Raises UserError for others than BatchNorm2d."""
    _become(module, SharedStatistics)


def _become(module: torch.nn.Module, kind: type[torch.nn.BatchNorm2d]) -> None:
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            if type(part) is not torch.nn.BatchNorm2d:
                raise UserError(
                    f"model.path: the classifier has a {type(part).__name__}; only the statistics of BatchNorm2d can "
                    "be fixed or shared: give one with BatchNorm2d, or with layer or group normalisation"
                )
            part.__class__ = kind
