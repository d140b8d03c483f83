"""RMU: the activations of forget answers towards a random vector (Li et al. 2024, arXiv 2403.03218)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ofmu_ray.config.method_options import OneLoopConfig
from ofmu_ray.config.ranges import not_negative, positive
from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class RMUConfig(OneLoopConfig):
    """Representation misdirection (Li et al. 2024, arXiv 2403.03218): a layer towards a random vector."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    retain_weight: float = 1.0
    """alpha, weight of the distance to the untouched model's activations on retain answers."""
    layer: int | None = None
    """Layer whose output is steered, from 0; null: 7 (OpenUnlearning), or the middle layer of a model with fewer."""
    steering: float = 2.0
    """c, norm of the random target vector."""
    train_layers: int | None = None
    """Train the last n layers up to `layer` only (the authors use 3); null: all weights up to it (OpenUnlearning)."""
    reduction: Literal["row_mean", "peer_broadcast"] = "row_mean"
    """row_mean: mean over rows of each row's mean over tokens; peer_broadcast: as OpenUnlearning computes it."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "forget_weight", "retain_weight", "layer")
        positive(section, self, "steering", "train_layers")


OPTIONS = RMUConfig
SPACE = Space(
    (
        rate("rmu.optimizer.lr"),
        Knob(
            "rmu.steering",
            LogUniform(1.0, 100.0),
            "2 in OpenUnlearning, 20 and more for the authors' 7 B models (arXiv 2403.03218)",
        ),
        Knob("rmu.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
