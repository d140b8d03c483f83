"""BLUR: bi-level unlearning by projection (Reisizadeh et al. 2025, arXiv 2506.08164)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts
from ofmu_ray.algorithm.space import Vector, add_
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.features.need import Need
from ofmu_ray.methods.blur import BLURConfig
from ofmu_ray.methods.npo.method import npo_loss
from ofmu_ray.methods.one_loop import OneLoop


class BLUR(OneLoop[BLURConfig]):
    """Steps down gamma g_f + g_r - (<g_f, g_r> / |g_f|^2) g_f: forgetting has priority, the retain loss gets what is
    orthogonal to it.

    g_f: gradient of the lower level, NPO's loss (BLUR-NPO) or -NLL, on forget answers; g_r: of the retain NLL. So
    <direction, g_f> = gamma |g_f|^2 whatever g_r is. NPO here is the sequence-level loss of its paper; the authors'
    MUSE code applies its formula to single logits instead.
    """

    name = "blur"
    retain_weight = 1.0

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", "nll"),) if self.config.forget_loss == "npo" else ()

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        if self.config.forget_loss == "nll":
            return self.negated_loss(module, micro)
        return npo_loss(module, micro, self.config.npo_beta)

    def direction(
        self, engine: Engine, forget: Vector | None, retain: Vector | None, figures: dict[str, float]
    ) -> Vector:
        assert forget is not None
        assert retain is not None
        fr, ff, rr = engine.dot((forget, retain), (forget, forget), (retain, retain))
        if ff > 0 and rr > 0:
            figures["gradient_cosine"] = fr / (ff * rr) ** 0.5
        return add_(retain, forget, self.config.forget_weight - (fr / ff if ff > 0 else 0.0))


METHOD = BLUR
