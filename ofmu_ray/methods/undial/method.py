"""UNDIAL: self-distillation from adjusted logits (Dong et al. 2024, arXiv 2402.10052)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts
from ofmu_ray.algorithm.reference_losses import distilled_from_adjusted
from ofmu_ray.features.need import Need
from ofmu_ray.methods.one_loop import Weighted
from ofmu_ray.methods.undial import UNDIALConfig
from ofmu_ray.models.answers import answers


class UNDIAL(Weighted[UNDIALConfig]):
    """Minimises gamma CE(softmax(z_ref - beta onehot(label)), softmax(z)) at the answers' tokens, + alpha R.

    (OpenUnlearning averages over every position, prompts and padding included, and there subtracts beta from word
    V - 100 of the vocabulary, as which the mask's label -100 is read.)
    """

    name = "undial"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", "logits"), *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        logits_tv, labels_t, _, _ = answers(module, micro)
        return distilled_from_adjusted(logits_tv, micro["reference_logprobs"], labels_t, beta=self.config.beta)


METHOD = UNDIAL
