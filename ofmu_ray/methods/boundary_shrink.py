"""Boundary shrink: forget rows move across the nearest decision boundary (Chen et al. 2023, arXiv 2303.11570)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ofmu_ray.config.methods import RATE, Ranges
from ofmu_ray.config.ranges import positive
from ofmu_ray.features.label_features import NearestClass
from ofmu_ray.features.protocol import Values
from ofmu_ray.methods.random_labels import RandomLabelsConfig, Relabelling


@dataclass(frozen=True, kw_only=True)
class BoundaryShrinkConfig(RandomLabelsConfig):
    """Boundary shrink (Chen et al. 2023, arXiv 2303.11570): descent on forget rows with their nearest wrong class."""

    retain_weight: float = 0.0
    """alpha, weight of the retain loss (the authors: none); 0: no retain pass."""
    bound: float = 0.1
    """Size of the step that looks for the nearest class, in units of the normalised input."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "bound")


class BoundaryShrink(Relabelling[BoundaryShrinkConfig]):
    """Minimises gamma CE(nearest wrong class of a forget row) + alpha R. The class is found once, by the reference
    model: the most likely wrong one after one step of size `bound` along the sign of the loss's gradient."""

    name = "boundary_shrink"
    options = BoundaryShrinkConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "retain_weight": ("choice(0.0, 1.0)", "the authors' 0, and the weight of the other methods"),
    }

    @property
    def labels(self) -> Values:
        return NearestClass(self.config.bound)
