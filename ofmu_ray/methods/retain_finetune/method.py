"""Fine-tuning on retain rows only: the control that forgets nothing on purpose."""

from __future__ import annotations

from ofmu_ray.methods.one_loop import OneLoop
from ofmu_ray.methods.retain_finetune import RetainFinetuneConfig


class RetainFinetune(OneLoop[RetainFinetuneConfig]):
    """Minimises L_r, the token-mean NLL of retain answers; forget rows are not used."""

    name = "retain_finetune"
    asks = frozenset()
    forget_weight = 0.0
    retain_weight = 1.0


METHOD = RetainFinetune
