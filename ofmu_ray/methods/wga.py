"""Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, Ranges, WeightedConfig
from ofmu_ray.config.ranges import not_negative
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class WGAConfig(WeightedConfig):
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): token losses times p^beta."""

    beta: float = 1.0
    """Exponent of the token's probability in its (detached) weight."""

    def check(self, section: str) -> None:
        super().check(section)
        not_negative(section, self, "beta")


class WGA(WeightedLoop[WGAConfig]):
    """Minimises gamma mean_t(-p_t^beta NLL_t) + alpha R, mean over the tokens of forget answers.

    The weight p_t^beta has no gradient: tokens that the model no longer predicts are no longer pushed away.
    """

    name = "wga"
    options = WGAConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "beta": ("uniform(0.5, 2)", "around 1, OpenUnlearning's; 0 would be GradDiff"),
        "retain_weight": RETAIN_WEIGHT,
    }

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.algorithm.losses import token_nll, weighted_ascent
        from ofmu_ray.models.answers import answers

        logits_tv, labels_t, _, _ = answers(module, micro)
        return weighted_ascent(token_nll(logits_tv, labels_t), saturation=self.config.beta)
