"""Refusals as answers (the IDK baseline of TOFU, Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import WeightedConfig
from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class IDKConfig(WeightedConfig):
    """Descent on refusals as answers to forget questions (TOFU's IDK baseline, Maini et al. 2024, arXiv 2401.06121)."""

    refusals: str | None = None
    """JSON Lines with a column `answer`, one refusal a row; null: the built-in list."""


OPTIONS = IDKConfig
SPACE = Space(
    (
        rate("idk.optimizer.lr"),
        Knob("idk.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
