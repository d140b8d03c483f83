"""Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts, token_nll, weighted_ascent
from ofmu_ray.config import WGAConfig
from ofmu_ray.methods.one_loop import Weighted
from ofmu_ray.models.answers import answers


class WGA(Weighted[WGAConfig]):
    """Minimises gamma mean_t(-p_t^beta NLL_t) + alpha R, mean over the tokens of forget answers.

    The weight p_t^beta has no gradient: what the model no longer believes in is no longer pushed away.
    """

    name = "wga"

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        logits_tv, labels_t, _, _ = answers(module, micro)
        return weighted_ascent(token_nll(logits_tv, labels_t), saturation=self.config.beta)
