"""Options of an optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ofmu_ray.config.ranges import not_negative, positive, require

LARGE = 7e9
"""Parameters of the models that published learning rates are for."""


def rate_for(trained: float) -> float:
    """AdamW's learning rate for so many trained parameters, two digits: 1e-5 at 7 B, and the larger, the fewer they are
    (by the square root).

    Near the rates found by hand for small models, and those published for 7 B (docs/decisions.md).
    """
    return float(f"{1e-5 * math.sqrt(LARGE / trained):.1e}")


def scale_for(trained: float) -> float:
    """Factor on learning rates meant for 1 B parameters, by the same rule."""
    return float(f"{math.sqrt(1e9 / trained):.1e}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser of one loop."""

    name: Literal["sgd", "adamw"] = "adamw"
    """Update rule, elementwise on the rank's shard of the fp32 weights (torch.optim)."""
    lr: float | None = None
    """Learning rate (per step); null: 1e-5 x sqrt(7e9 / trained parameters), for adamw."""
    clip: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    momentum: float = 0.0
    """Momentum of sgd (0 to 1)."""
    beta1: float = 0.9
    """First-moment decay of adamw."""
    beta2: float = 0.999
    """Second-moment decay of adamw."""
    eps: float = 1e-8
    """Denominator floor of adamw."""
    weight_decay: float = 0.0
    """Decoupled weight decay per step, times lr."""
    warmup_fraction: float = 0.0
    """Fraction of the rounds over which the learning rate rises linearly from 0 (0 to 1)."""
    decay: Literal["constant", "linear", "cosine", "step"] = "constant"
    """Learning rate schedule after the warm-up; linear and cosine end at a tenth of lr in the last round; step: times
    step_factor at each of the milestones."""
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """With decay step: where the rate falls, as fractions of the rounds (0 to 1), rising."""
    step_factor: float = 0.1
    """With decay step: the factor at each milestone."""

    @property
    def rate(self) -> float:
        """`lr`, or that of a large model if nothing has set it by the size."""
        return rate_for(LARGE) if self.lr is None else self.lr

    def check(self, section: str) -> None:
        """Checks ranges. The owner calls it, because only the owner knows the option's full name."""
        positive(section, self, "lr", "clip", "eps", "step_factor")
        rising = all(0 < a < b for a, b in zip(self.milestones, [*self.milestones[1:], 1.0], strict=False))
        require(rising, f"{section}.milestones", self.milestones, "rising numbers between 0 and 1")
        not_negative(section, self, "weight_decay")
        require(0 <= self.warmup_fraction < 1, f"{section}.warmup_fraction", self.warmup_fraction, "in [0, 1)")
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{section}.{name}", value, "at least 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class SharedBaseConfig(OptimizerConfig):
    """AdamW whose moments are residuals to a common state that both loops update (DualOptim+)."""

    base_beta1: float
    """First-moment decay of the common state."""
    base_beta2: float
    """Second-moment decay of the common state."""
