"""CE-U: cross-entropy unlearning (Yang 2025, arXiv 2503.01224)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, OneLoopConfig, Ranges
from ofmu_ray.config.ranges import not_negative
from ofmu_ray.data.batch import IGNORED
from ofmu_ray.methods.one_loop import OneLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class CEUConfig(OneLoopConfig):
    """CE-U (Yang 2025, arXiv 2503.01224): distillation from the model's own distribution without the true token."""

    skip_tokens: int = 1
    """Leading answer tokens without a loss (a footnote of the paper)."""

    def check(self, section: str) -> None:
        super().check(section)
        not_negative(section, self, "skip_tokens")


class CEU(OneLoop[CEUConfig]):
    """Minimises the cross-entropy to the model's own distribution without the true token, mean over answer tokens.

    The first `skip_tokens` tokens of each answer have no loss (a footnote of the paper). Retain rows are not used.
    """

    name = "ceu"
    options = CEUConfig
    space: ClassVar[Ranges] = {"optimizer.lr": RATE}

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"answers", "texts"} if self.config.skip_tokens else {"answers"})

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.algorithm.losses import distilled_without_truth
        from ofmu_ray.models.answers import answers

        labels = micro["labels"]
        answer = labels != IGNORED
        kept = answer & (answer.cumsum(1) > self.config.skip_tokens)
        logits_tv, labels_t, _, _ = answers(module, micro, labels.where(kept, IGNORED))
        return distilled_without_truth(logits_tv, labels_t)
