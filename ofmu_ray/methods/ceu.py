"""CE-U: cross-entropy unlearning (Yang 2025, arXiv 2503.01224)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts, distilled_without_truth
from ofmu_ray.config import CEUConfig
from ofmu_ray.data.batch import IGNORED
from ofmu_ray.methods.one_loop import OneLoop
from ofmu_ray.models.answers import answers


class CEU(OneLoop[CEUConfig]):
    """Minimises the cross-entropy to the model's own distribution without the true token, mean over answer tokens.

    The first `skip_tokens` tokens of each answer have no loss (a footnote of the paper). Retain rows are not used.
    """

    name = "ceu"

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        labels = micro["labels"]
        answer = labels != IGNORED
        kept = answer & (answer.cumsum(1) > self.config.skip_tokens)
        logits_tv, labels_t, _, _ = answers(module, micro, labels.where(kept, IGNORED))
        return distilled_without_truth(logits_tv, labels_t)
