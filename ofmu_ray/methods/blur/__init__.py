"""BLUR: bi-level unlearning by projection (Reisizadeh et al. 2025, arXiv 2506.08164)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ofmu_ray.config.method_options import OneLoopConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class BLURConfig(OneLoopConfig):
    """BLUR (Reisizadeh et al. 2025, arXiv 2506.08164): bi-level, forgetting first; the retain gradient is projected."""

    forget_loss: Literal["npo", "nll"] = "npo"
    """Lower-level objective: NPO (BLUR-NPO) or the negated NLL."""
    npo_beta: float = 0.1
    """Inverse temperature of the NPO loss."""
    forget_weight: float = 1.0
    """gamma, weight of the forget gradient beside the projected retain gradient (the authors' MUSE runs: 1)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "npo_beta", "forget_weight")


OPTIONS = BLURConfig
SPACE = Space(
    (
        rate("blur.optimizer.lr"),
        Knob("blur.npo_beta", LogUniform(0.03, 1.0), "the range of NPO's own beta"),
        Knob("blur.forget_weight", LogUniform(0.3, 3.0), "half a decade around the authors' 1"),
    )
)
