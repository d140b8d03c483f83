"""Gradient ascent on the forget loss (Jang et al. 2023, arXiv 2210.01504)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts
from ofmu_ray.config import GradientAscentConfig
from ofmu_ray.engines.language import causal_lm_loss
from ofmu_ray.methods.one_loop import OneLoop


def negated_nll(module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
    """- NLL of the answers' tokens, mean over tokens."""
    total, count = causal_lm_loss(module, micro)
    return -total, count


class GradientAscent(OneLoop[GradientAscentConfig]):
    """Minimises -L_f, the negated token-mean NLL of forget answers."""

    name = "gradient_ascent"

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return negated_nll(module, micro)
