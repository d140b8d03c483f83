"""SatImp: saturation and importance weights (Yang et al. 2025, arXiv 2505.11953)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts, token_nll, weighted_ascent
from ofmu_ray.config import SatImpConfig
from ofmu_ray.methods.one_loop import Weighted
from ofmu_ray.models.answers import answers


class SatImp(Weighted[SatImpConfig]):
    """Minimises gamma mean_t(-p_t^b1 (1 - p_t)^b2 NLL_t) + alpha R, mean over the tokens of forget answers.

    The weights have no gradient: p^b1 (saturation) spares tokens that are forgotten already, (1 - p)^b2 (importance)
    those that the model would say anyway.
    """

    name = "satimp"

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        logits_tv, labels_t, _, _ = answers(module, micro)
        exponents = {"saturation": self.config.beta1, "importance": self.config.beta2}
        return weighted_ascent(token_nll(logits_tv, labels_t), **exponents)
