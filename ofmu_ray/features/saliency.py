"""Which weights forget rows depend on most, by the gradient of their loss under the reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ofmu_ray import progress
from ofmu_ray.data.batch import Batch
from ofmu_ray.features.protocol import ParameterValues, Row

if TYPE_CHECKING:
    import torch

    from ofmu_ray.algorithm.space import Vector
    from ofmu_ray.engines.protocol import Engine
    from ofmu_ray.features.reference import Reference

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class GradientMask(ParameterValues):
    """1 where |gradient of the summed loss| is among the largest `share` of all trainable weights, else 0."""

    name = "gradient_mask"
    share: float

    def compute(self, reference: Reference, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        import torch

        named = [(name, p) for name, p in reference.module.named_parameters() if p.requires_grad]
        sums = [torch.zeros_like(parameter) for _, parameter in named]
        with progress.bar(self.name.replace("_", " "), len(rows), "row") as bar:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                chosen = rows[start : start + ROWS_AT_ONCE]
                loss, _ = reference.loss(reference.module, reference.collated(chosen))
                gradients = torch.autograd.grad(loss, [parameter for _, parameter in named])
                torch._foreach_add_(sums, gradients)
                bar.update(len(chosen))
        sizes = torch.cat([values.abs().flatten() for values in sums])
        kept = max(1, round(self.share * len(sizes)))
        order = torch.argsort(sizes, descending=True, stable=True)
        mask = torch.zeros_like(sizes)
        mask[order[:kept]] = 1.0
        pieces = torch.split(mask, [values.numel() for values in sums])
        return {
            name: piece.reshape(parameter.shape).cpu() for (name, parameter), piece in zip(named, pieces, strict=True)
        }


def as_vector(engine: Engine, parameters: Mapping[str, torch.Tensor]) -> Vector:
    """Tensors by the names of parameters as a vector of the engine: the gradient of their inner product with the
    weights. Not counted as a pass. Collective; not for ZeRO-3, where no rank has a whole parameter."""
    import torch

    from ofmu_ray.models.answers import unwrapped

    def product(module: torch.nn.Module, micro: Any) -> tuple[torch.Tensor, int]:
        named = unwrapped(module).named_parameters()
        terms = [(p * parameters[name].to(p.device, p.dtype)).sum() for name, p in named if name in parameters]
        return torch.stack(terms).sum(), 1

    before = engine.account.state()
    vector, _ = engine.gradient(Batch(micro=[{}]), product, kind="forget")
    engine.account.load(before)
    return vector
