"""PDU: primal-dual unlearning (Entesari et al. 2025, arXiv 2506.05314)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, OneLoopConfig, Ranges
from ofmu_ray.config.ranges import not_negative, positive
from ofmu_ray.methods.one_loop import OneLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts
    from ofmu_ray.algorithm.space import Vector
    from ofmu_ray.engines.protocol import Engine


@dataclass(frozen=True, kw_only=True)
class PDUConfig(OneLoopConfig):
    """Primal-dual unlearning (Entesari et al. 2025, arXiv 2506.05314): flat logits on forget answers, bounded R."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    dual_start: float = 1.0
    """lambda_0, first weight of the retain constraint (OpenUnlearning's notes advise 50 to 100)."""
    dual_rate: float = 1.0
    """eta, step of the dual variable per round."""
    retain_bound: float | None = None
    """epsilon, largest accepted retain loss (nats per token); null: (1 + tolerance) times the first batch's."""
    tolerance: float = 0.1
    """With retain_bound null, how much the retain loss may rise, relative to where it starts."""
    warmup_rounds: int = 0
    """Rounds before the dual variable starts to move."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "forget_weight", "retain_bound")
        not_negative(section, self, "dual_start", "dual_rate", "tolerance", "warmup_rounds")


class PDU(OneLoop[PDUConfig]):
    """Minimises gamma L_f subject to R <= eps by steps down gamma L_f + lambda (R - eps).

    L_f: mean over forget answers' tokens of (max_v z - mean_v z)^2, flat logits; R: token-mean NLL of retain answers.
    After the warm-up, lambda <- max(0, lambda + eta (R - eps)) each round, from R over the global batch at the weights
    before the step: the same number on every rank.
    """

    name = "pdu"
    options = PDUConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "dual_start": ("loguniform(1, 100)", "1 in OpenUnlearning; its documentation advises 50 to 100"),
        "dual_rate": ("loguniform(0.1, 10)", "a decade around OpenUnlearning's 1"),
    }

    def __init__(self, config: PDUConfig, rounds: int | None = None):
        super().__init__(config, rounds)
        self.forget_weight = config.forget_weight
        self.dual = config.dual_start
        self.bound = config.retain_bound

    def batches_per_round(self) -> dict[str, int]:
        return {"forget": 1, "retain": 1}  # whatever lambda is: the dual step needs R

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        from ofmu_ray.algorithm.losses import logit_margin
        from ofmu_ray.models.answers import answers

        return logit_margin(answers(module, micro).logits_tv)

    def direction(
        self, engine: Engine, forget: Vector | None, retain: Vector | None, series: dict[str, float]
    ) -> Vector:
        loss, config = series["retain_loss"], self.config
        if self.bound is None:
            self.bound = (1 + config.tolerance) * loss
        self.retain_weight = self.dual
        series.update(dual=self.dual, retain_excess=loss - self.bound)
        if self.rounds_done >= config.warmup_rounds:
            self.dual = max(0.0, self.dual + config.dual_rate * (loss - self.bound))
        return super().direction(engine, forget, retain, series)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "dual": self.dual, "bound": self.bound}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.dual, self.bound = float(state["dual"]), state["bound"]
