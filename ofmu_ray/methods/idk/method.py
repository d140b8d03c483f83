"""Refusals as answers (the IDK baseline of TOFU, Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts
from ofmu_ray.data.batch import REFUSAL
from ofmu_ray.engines.protocol import Batch
from ofmu_ray.features.need import Need
from ofmu_ray.methods.idk import IDKConfig
from ofmu_ray.methods.one_loop import Weighted
from ofmu_ray.models.answers import causal_lm_loss


class IDK(Weighted[IDKConfig]):
    """Minimises gamma NLL(refusal to the forget question) + alpha R, mean over tokens; forget answers are not seen."""

    name = "idk"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", "refusal"), *super().needs)

    def forget_batch(self, batch: Batch) -> Batch:
        refusals = [
            {name.removeprefix(REFUSAL): tensor for name, tensor in micro.items() if name.startswith(REFUSAL)}
            for micro in batch.micro
        ]
        return Batch(refusals, batch.row_ids)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return causal_lm_loss(module, micro)


METHOD = IDK
