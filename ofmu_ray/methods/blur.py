"""BLUR: bi-level unlearning by projection (Reisizadeh et al. 2025, arXiv 2506.08164)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ofmu_ray.config.methods import MYPY, RATE, OneLoopConfig, Ranges
from ofmu_ray.config.ranges import positive
from ofmu_ray.features.builtin import NLL
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.npo import npo_loss
from ofmu_ray.methods.one_loop import OneLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts
    from ofmu_ray.algorithm.space import Vector
    from ofmu_ray.engines.protocol import Engine


@dataclass(frozen=True, kw_only=True)
class BLURConfig(OneLoopConfig):
    """BLUR (Reisizadeh et al. 2025, arXiv 2506.08164): bi-level, forgetting first; the retain gradient is projected."""

    forget_loss: Literal["npo", "nll"] = "npo"
    """Lower-level objective: NPO (BLUR-NPO) or the negated NLL."""
    npo_beta: float = 0.1
    """Inverse temperature of the NPO loss."""
    forget_weight: float = 1.0
    """gamma, weight of the forget gradient relative to the projected retain gradient (the authors' MUSE runs: 1)."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "npo_beta", "forget_weight")


class BLUR(OneLoop[BLURConfig]):
    """Steps down gamma g_f + g_r - (<g_f, g_r> / |g_f|^2) g_f: forgetting has priority, and the retain loss gets
    the orthogonal part.

    g_f: gradient of the lower level, NPO's loss (BLUR-NPO) or -NLL, on forget answers; g_r: of the retain NLL. So
    <direction, g_f> = gamma |g_f|^2 whatever g_r is. NPO here is the sequence-level loss of its paper; the authors'
    MUSE code applies its formula to single logits instead.
    """

    name = "blur"
    options = BLURConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "npo_beta": ("loguniform(0.03, 1)", "the range of NPO's own beta"),
        "forget_weight": ("loguniform(0.3, 3)", "half a decade around the authors' 1"),
    }
    retain_weight = 1.0

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", NLL),) if self.config.forget_loss == "npo" else ()

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        if self.config.forget_loss == "nll":
            return self.negated_loss(module, micro)
        return npo_loss(module, micro, self.config.npo_beta)

    def direction(
        self, engine: Engine, forget: Vector | None, retain: Vector | None, series: dict[str, float]
    ) -> Vector:
        from ofmu_ray.algorithm.space import add_

        assert forget is not None
        assert retain is not None
        fr, ff, rr = engine.dot((forget, retain), (forget, forget), (retain, retain))
        if ff > 0 and rr > 0:
            series["gradient_cosine"] = fr / (ff * rr) ** 0.5
        return add_(retain, forget, self.config.forget_weight - (fr / ff if ff > 0 else 0.0))
