"""SatImp: saturation and importance weights (Yang et al. 2025, arXiv 2505.11953)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, Ranges, WeightedConfig
from ofmu_ray.config.ranges import not_negative
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class SatImpConfig(WeightedConfig):
    """Saturation and importance weights (Yang et al. 2025, arXiv 2505.11953): token losses times p^b1 (1 - p)^b2."""

    forget_weight: float = 0.1
    """gamma, weight of the forget loss."""
    beta1: float = 5.0
    """Exponent of p (saturation)."""
    beta2: float = 1.0
    """Exponent of 1 - p (importance)."""

    def check(self, section: str) -> None:
        super().check(section)
        not_negative(section, self, "beta1", "beta2")


class SatImp(WeightedLoop[SatImpConfig]):
    """Minimises gamma mean_t(-p_t^b1 (1 - p_t)^b2 NLL_t) + alpha R, mean over the tokens of forget answers.

    The weights have no gradient: p^b1 (saturation) spares tokens that are already forgotten, (1 - p)^b2 (importance)
    those that the model would predict anyway.
    """

    name = "satimp"
    options = SatImpConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "forget_weight": ("loguniform(0.03, 1)", "OpenUnlearning's 0.1 up to the 1 of its documentation"),
        "beta1": ("uniform(3, 6)", "around OpenUnlearning's 5"),
        "beta2": ("uniform(0.5, 2)", "around OpenUnlearning's 1"),
    }

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.algorithm.losses import token_nll, weighted_ascent
        from ofmu_ray.models.answers import answers

        logits_tv, labels_t, _, _ = answers(module, micro)
        exponents = {"saturation": self.config.beta1, "importance": self.config.beta2}
        return weighted_ascent(token_nll(logits_tv, labels_t), **exponents)
