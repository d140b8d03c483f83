"""Fine-tuning on retain rows only: the control that forgets nothing on purpose."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import OneLoopConfig
from ofmu_ray.config.spaces import Space, rate


@dataclass(frozen=True, kw_only=True)
class RetainFinetuneConfig(OneLoopConfig):
    """Fine-tuning on retain rows only: what forgetting costs nothing to get."""


OPTIONS = RetainFinetuneConfig
SPACE = Space((rate("retain_finetune.optimizer.lr"),))
