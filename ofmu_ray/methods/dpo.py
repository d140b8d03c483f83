"""Direct preference optimisation of refusals over forget answers (TOFU's DPO baseline, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, Ranges, WeightedConfig
from ofmu_ray.config.ranges import positive
from ofmu_ray.data.batch import REFUSAL
from ofmu_ray.features.builtin import NLL, Refusals
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.npo import answer_nll
from ofmu_ray.methods.one_loop import WeightedLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts


@dataclass(frozen=True, kw_only=True)
class DPOConfig(WeightedConfig):
    """Direct preference optimisation of refusals over forget answers (TOFU's DPO baseline)."""

    beta: float = 0.1
    """Inverse temperature."""
    refusals: str | None = None
    """JSON Lines with a column `answer`, one refusal per row; null: the built-in list."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "beta")


def preference_loss(module: torch.nn.Module, micro: Mapping[str, Any], beta: float) -> LossParts:
    """`preferred_refusals` on a micro-batch with answers, the texts preferred over them, and reference values."""
    from ofmu_ray.algorithm.reference_losses import preferred_refusals

    nll_r, refusal_nll_r = answer_nll(module, micro), answer_nll(module, micro, REFUSAL)
    references = (micro[name].to(nll_r.dtype) for name in ("reference_nll", "refusal_reference_nll"))
    reference_nll_r, reference_refusal_nll_r = references
    return preferred_refusals(nll_r, reference_nll_r, refusal_nll_r, reference_refusal_nll_r, beta=beta)


class DPO(WeightedLoop[DPOConfig]):
    """Minimises gamma `preferred_refusals` + alpha R, with a forward pass each for answer and refusal."""

    name = "dpo"
    options = DPOConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "beta": ("loguniform(0.03, 1)", "a decade around 0.1, OpenUnlearning's and the NPO paper's"),
        "retain_weight": RETAIN_WEIGHT,
    }

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"answers", "texts"})

    @property
    def needs(self) -> tuple[Need, ...]:
        refusals = Refusals(self.config.refusals)
        own = (Need("forget", NLL), Need("forget", refusals), Need("forget", NLL, of=refusals))
        return (*own, *super().needs)

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return preference_loss(module, micro, self.config.beta)
