"""SimNPO: negative preference optimisation without a reference model (Fan et al. 2024, arXiv 2410.07163)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, Ranges, WeightedConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class SimNPOConfig(WeightedConfig):
    """NPO without a reference model, on length-normalised losses (Fan et al. 2024, arXiv 2410.07163)."""

    forget_weight: float = 0.125
    """gamma, weight of the forget loss."""
    beta: float = 4.5
    """Inverse temperature."""
    delta: float = 0.0
    """Margin, subtracted from the mean token NLL."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "beta")


def answer_sums(module: torch.nn.Module, micro: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the token losses of each row's answer and its number of tokens, [rows] each."""
    import torch

    from ofmu_ray.algorithm.losses import row_sums, token_nll
    from ofmu_ray.models.answers import answers

    logits_tv, labels_t, rows_t, rows = answers(module, micro)
    nll_t = token_nll(logits_tv, labels_t)
    nll_r, tokens_r = (row_sums(values, rows_t, rows) for values in (nll_t, torch.ones_like(nll_t)))
    return nll_r, tokens_r


class SimNPO(WeightedLoop[SimNPOConfig]):
    """Minimises gamma mean_i(-(2 / beta) log sigmoid(beta (NLL_i / T_i - delta))) + alpha R, mean over forget rows.

    NLL_i is the sum over the T_i tokens of the answer, its end included.
    """

    name = "simnpo"
    options = SimNPOConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "beta": ("uniform(2, 5.5)", "around OpenUnlearning's 4.5"),
        "forget_weight": (
            "loguniform(0.06, 1)",
            "from half of OpenUnlearning's 0.125 to the weight of the retain loss",
        ),
    }

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.algorithm.losses import simple_negative_preference

        nll_r, tokens_r = answer_sums(module, micro)
        return simple_negative_preference(nll_r, tokens_r, beta=self.config.beta, delta=self.config.delta)
