"""Direct preference optimisation of refusals over forget answers (TOFU's DPO baseline, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts
from ofmu_ray.algorithm.reference_losses import preferred_refusals
from ofmu_ray.data.batch import REFUSAL
from ofmu_ray.features.need import Need
from ofmu_ray.methods.dpo import DPOConfig
from ofmu_ray.methods.npo.method import answer_nll
from ofmu_ray.methods.one_loop import Weighted


def preference_loss(module: torch.nn.Module, micro: Mapping[str, Any], beta: float) -> LossParts:
    """`preferred_refusals` on a micro-batch that holds answers, the texts preferred to them, and reference values."""
    nll_r, refusal_nll_r = answer_nll(module, micro), answer_nll(module, micro, REFUSAL)
    references = (micro[name].to(nll_r.dtype) for name in ("reference_nll", "refusal_reference_nll"))
    reference_nll_r, reference_refusal_nll_r = references
    return preferred_refusals(nll_r, reference_nll_r, refusal_nll_r, reference_refusal_nll_r, beta=beta)


class DPO(Weighted[DPOConfig]):
    """Minimises gamma `preferred_refusals` + alpha R; answer and refusal each go through the model."""

    name = "dpo"

    @property
    def needs(self) -> tuple[Need, ...]:
        own = (Need("forget", "nll"), Need("forget", "refusal"), Need("forget", "refusal_nll"))
        return (*own, *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return preference_loss(module, micro, self.config.beta)


METHOD = DPO
