"""UNDIAL: self-distillation from adjusted logits (Dong et al. 2024, arXiv 2402.10052)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, Ranges, WeightedConfig, peer_optimizer
from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.features.builtin import LOG_PROBABILITIES
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class UNDIALConfig(WeightedConfig):
    """Self-distillation from adjusted logits (Dong et al. 2024, arXiv 2402.10052)."""

    optimizer: OptimizerConfig = field(default_factory=lambda: peer_optimizer(1e-4))
    """The optimiser."""
    retain_weight: float = 0.0
    """alpha, weight of the retain loss; 0: no retain pass."""
    beta: float = 10.0
    """Subtracted from the reference model's logit of each answer token."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "beta")


class UNDIAL(WeightedLoop[UNDIALConfig]):
    """Minimises gamma CE(softmax(z_ref - beta onehot(label)), softmax(z)) at the answers' tokens, + alpha R.

    (OpenUnlearning averages over every position, prompts and padding included. There it subtracts beta from token
    V - 100, since it reads the mask's label -100 as an index.)
    """

    name = "undial"
    options = UNDIALConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": (
            "loguniform(3e-5, 1e-3)",
            "half a decade below OpenUnlearning's default of 0.0001 and a decade above",
        ),
        "beta": ("loguniform(3, 30)", "half a decade around OpenUnlearning's 10"),
        "retain_weight": ("choice(0.0, 1.0)", "OpenUnlearning's 0, and the weight of the other methods"),
    }

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("forget", LOG_PROBABILITIES), *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.algorithm.reference_losses import distilled_from_adjusted
        from ofmu_ray.models.answers import answers

        logits_tv, labels_t, _, _ = answers(module, micro)
        return distilled_from_adjusted(logits_tv, micro["reference_logprobs"], labels_t, beta=self.config.beta)
