"""Other classes for forget images: drawn at random, or the nearest one. Importing this does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ofmu_ray.features.protocol import FeatureContext, Row, Values

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ofmu_ray.features.reference import Reference

KEY = "other_labels"


@dataclass(frozen=True)
class DrawnLabels(Values):
    """A class drawn by a hash of seed and row id."""

    name = "drawn_labels"
    key = KEY
    per_token = False
    dtype = "int64"
    spells = False
    seed: int = 0

    def resolved(self, settings: FeatureContext) -> DrawnLabels:
        return replace(self, seed=settings.seed)

    def shape(self, config: Any) -> tuple[int, ...]:
        return ()

    def read(self, reference: Reference, rows: Sequence[Row]) -> list[np.ndarray]:
        import numpy as np

        module: Any = reference.module
        classes = int(module.config.num_labels)
        return [np.array([drawn_class(row["row_id"], classes, self.seed)]) for row in rows]


def drawn_class(row_id: str, classes: int, seed: int) -> int:
    """A class from 0 to `classes` - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{row_id}".encode()).digest()[:8], "big") % classes


@dataclass(frozen=True)
class NearestClass(Values):
    """The class across the nearest decision boundary: the most likely wrong class after a step of size `bound` along
    the sign of the loss's gradient (Chen et al. 2023, arXiv 2303.11570)."""

    name = "nearest_class"
    key = KEY
    per_token = False
    dtype = "int64"
    spells = False
    bound: float = 0.1
    """In units of the normalised input."""

    def shape(self, config: Any) -> tuple[int, ...]:
        return ()

    def measure(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        import torch
        from torch.nn import functional

        inner: Any = module
        labels = batch["labels"][:, 1]
        with torch.enable_grad():
            images = inner.image_processor.normalised(batch["pixels"]).requires_grad_(True)
            loss = functional.cross_entropy(inner(pixel_values=images).logits, labels)
            (slope,) = torch.autograd.grad(loss, images)
        logits = inner(pixel_values=(images + self.bound * slope.sign()).detach()).logits
        nearest: torch.Tensor = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
        return nearest
