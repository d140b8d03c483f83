"""Refusals as answers (the IDK baseline of TOFU, Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, Ranges, WeightedConfig
from ofmu_ray.data.batch import REFUSAL, Batch
from ofmu_ray.features.builtin import Refusals
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class IDKConfig(WeightedConfig):
    """Descent on refusals as answers to forget questions (TOFU's IDK baseline, Maini et al. 2024, arXiv 2401.06121)."""

    refusals: str | None = None
    """JSON Lines with a column `answer`, one refusal per row; null: the built-in list."""


class IDK(WeightedLoop[IDKConfig]):
    """Minimises gamma NLL(refusal to the forget question) + alpha R, mean over tokens; forget answers are not used."""

    name = "idk"
    options = IDKConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "retain_weight": RETAIN_WEIGHT,
    }

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"answers", "texts"})

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", Refusals(self.config.refusals)), *super().needs)

    def forget_batch(self, batch: Batch) -> Batch:
        refusals = [
            {name.removeprefix(REFUSAL): tensor for name, tensor in micro.items() if name.startswith(REFUSAL)}
            for micro in batch.micro
        ]
        return Batch(refusals, batch.row_ids)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.models.answers import causal_lm_loss

        return causal_lm_loss(module, micro)
