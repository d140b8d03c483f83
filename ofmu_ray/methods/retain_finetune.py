"""Fine-tuning on retain rows only: the control that does not try to forget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ofmu_ray.config.methods import RATE, OneLoopConfig, Ranges
from ofmu_ray.methods.one_loop import OneLoop


@dataclass(frozen=True, kw_only=True)
class RetainFinetuneConfig(OneLoopConfig):
    """Fine-tuning on retain rows only: the forgetting that comes for free."""


class RetainFinetune(OneLoop[RetainFinetuneConfig]):
    """Minimises L_r, the token-mean NLL of retain answers; forget rows are not used."""

    name = "retain_finetune"
    options = RetainFinetuneConfig
    space: ClassVar[Ranges] = {"optimizer.lr": RATE}
    asks = frozenset()
    forget_weight = 0.0
    retain_weight = 1.0
