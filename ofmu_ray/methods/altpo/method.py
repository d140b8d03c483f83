"""AltPO: alternate preference optimisation (Mekala et al. 2024, arXiv 2409.13474)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts
from ofmu_ray.features.need import Need, Sampling
from ofmu_ray.methods.altpo import AltPOConfig
from ofmu_ray.methods.dpo.method import preference_loss
from ofmu_ray.methods.one_loop import Weighted


class AltPO(Weighted[AltPOConfig]):
    """Minimises gamma `preferred_refusals` + alpha R, with answers that the untouched model drew in place of refusals.

    Each row has several of them; epoch e uses number e modulo how many there are, a function of the round alone.
    """

    name = "altpo"

    @property
    def needs(self) -> tuple[Need, ...]:
        config = self.config
        temperature = config.temperature or (2.0 if config.prompt is None else 1.0)
        sampling = Sampling(config.alternatives, temperature, config.top_k, config.max_new_tokens, config.prompt)
        drawn = Need("forget", "alternative", sampling=sampling)
        return (Need("forget", "nll"), drawn, Need("forget", "refusal_nll"), *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return preference_loss(module, micro, self.config.beta)


METHOD = AltPO
