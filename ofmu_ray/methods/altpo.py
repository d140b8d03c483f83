"""AltPO: alternate preference optimisation (Mekala et al. 2024, arXiv 2409.13474)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, Ranges, WeightedConfig
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.features.builtin import NLL, Alternatives
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.dpo import preference_loss
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class AltPOConfig(WeightedConfig):
    """AltPO (Mekala et al. 2024, arXiv 2409.13474): DPO of the model's own alternative answers over forget answers."""

    beta: float = 0.1
    """Inverse temperature of the loss."""
    alternatives: int = 5
    """Alternatives sampled per forget row before the first round (the authors: 5); an epoch uses one of them."""
    temperature: float | None = None
    """Sampling temperature; null: 1 with `prompt` (as the authors), else 2: at 1, fitted models repeat the answer."""
    top_k: int = 50
    """Sample from the most likely tokens, this many (transformers' default, which the authors keep)."""
    max_new_tokens: int = 200
    """Maximum length of an alternative in tokens (the authors: 200)."""
    prompt: str | None = None
    """Prompt for an alternative, with {question} and {answer}; null: the question alone."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "beta", "alternatives", "temperature", "top_k", "max_new_tokens")
        valid = self.prompt is None or "{question}" in self.prompt
        require(valid, f"{section}.prompt", self.prompt, "a text with {question} in it")


class AltPO(WeightedLoop[AltPOConfig]):
    """Minimises gamma `preferred_refusals` + alpha R, with answers of the reference model in place of refusals.

    Each row has several; epoch e uses number e modulo their count, a function of the round alone.
    """

    name = "altpo"
    options = AltPOConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "beta": ("loguniform(0.03, 1)", "OpenUnlearning's grid for AltPO, 0.05 to 0.5, and NPO's own range"),
        "retain_weight": RETAIN_WEIGHT,
    }

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"answers", "texts"})

    @property
    def needs(self) -> tuple[Need, ...]:
        config = self.config
        temperature = config.temperature or (2.0 if config.prompt is None else 1.0)
        drawn = Alternatives(config.alternatives, temperature, config.top_k, config.max_new_tokens, config.prompt)
        return (Need("forget", NLL), Need("forget", drawn), Need("forget", NLL, of=drawn), *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return preference_loss(module, micro, self.config.beta)
