"""CE-U: cross-entropy unlearning (Yang 2025, arXiv 2503.01224)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import OneLoopConfig
from ofmu_ray.config.ranges import not_negative
from ofmu_ray.config.spaces import Space, rate


@dataclass(frozen=True, kw_only=True)
class CEUConfig(OneLoopConfig):
    """CE-U (Yang 2025, arXiv 2503.01224): distillation from the model's own distribution without the true token."""

    skip_tokens: int = 1
    """Leading answer tokens without a loss (a footnote of the paper)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "skip_tokens")


OPTIONS = CEUConfig
SPACE = Space((rate("ceu.optimizer.lr"),))
