"""Direct preference optimisation of refusals over forget answers (TOFU's DPO baseline, arXiv 2401.06121)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import WeightedConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class DPOConfig(WeightedConfig):
    """Direct preference optimisation of refusals over forget answers (TOFU's DPO baseline)."""

    beta: float = 0.1
    """Inverse temperature."""
    refusals: str | None = None
    """JSON Lines with a column `answer`, one refusal a row; null: the built-in list."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta")


OPTIONS = DPOConfig
SPACE = Space(
    (
        rate("dpo.optimizer.lr"),
        Knob("dpo.beta", LogUniform(0.03, 1.0), "a decade around 0.1, OpenUnlearning's and the NPO paper's"),
        Knob("dpo.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
