"""AltPO: alternate preference optimisation (Mekala et al. 2024, arXiv 2409.13474)."""

from __future__ import annotations

from dataclasses import dataclass

from ofmu_ray.config.method_options import WeightedConfig
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate


@dataclass(frozen=True, kw_only=True)
class AltPOConfig(WeightedConfig):
    """AltPO (Mekala et al. 2024, arXiv 2409.13474): DPO of the model's own alternative answers over forget answers."""

    beta: float = 0.1
    """Inverse temperature of the loss."""
    alternatives: int = 5
    """Alternatives drawn of each forget row before the first round (the authors: 5); an epoch uses one of them."""
    temperature: float | None = None
    """Temperature they are drawn at; null: 1 with `prompt` (as the authors), else 2: at 1, fitted models repeat it."""
    top_k: int = 50
    """Tokens they are drawn from, the likeliest ones (transformers' default, which the authors leave)."""
    max_new_tokens: int = 200
    """Longest alternative, tokens (the authors: 200)."""
    prompt: str | None = None
    """What the model is asked for an alternative, with {question} and {answer}; null: the question alone."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta", "alternatives", "temperature", "top_k", "max_new_tokens")
        told = self.prompt is None or "{question}" in self.prompt
        require(told, f"{section}.prompt", self.prompt, "a text with {question} in it")


OPTIONS = AltPOConfig
SPACE = Space(
    (
        rate("altpo.optimizer.lr"),
        Knob("altpo.beta", LogUniform(0.03, 1.0), "OpenUnlearning's grid for AltPO, 0.05 to 0.5, and NPO's own range"),
        Knob("altpo.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
