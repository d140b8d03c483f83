"""PDU: primal-dual unlearning (Entesari et al. 2025, arXiv 2506.05314)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.algorithm.losses import LossParts, logit_margin
from ofmu_ray.algorithm.space import Vector
from ofmu_ray.config import PDUConfig
from ofmu_ray.data.batch import IGNORED
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.methods.one_loop import OneLoop
from ofmu_ray.models.answers import answers, logits_at


class PDU(OneLoop[PDUConfig]):
    """Minimises gamma L_f subject to R <= eps by steps down gamma L_f + lambda (R - eps).

    L_f: mean over forget answers' tokens of (max_v z - mean_v z)^2, flat logits; R: token-mean NLL of retain answers.
    After the warm-up, lambda <- max(0, lambda + eta (R - eps)) each round, from R over the global batch at the weights
    before the step: the same number on every rank.
    """

    name = "pdu"

    def __init__(self, config: PDUConfig, rounds: int | None = None):
        super().__init__(config, rounds)
        self.forget_weight = config.forget_weight
        self.dual = config.dual_start
        self.bound = config.retain_bound

    def batches_per_round(self) -> dict[str, int]:
        return {"forget": 1, "retain": 1}  # whatever lambda is: the dual step needs R

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        if self.config.positions == "peer_unshifted":
            return logit_margin(logits_at(module, micro, micro["labels"] != IGNORED))
        return logit_margin(answers(module, micro).logits_tv)

    def direction(
        self, engine: Engine, forget: Vector | None, retain: Vector | None, figures: dict[str, float]
    ) -> Vector:
        loss, config = figures["retain_loss"], self.config
        if self.bound is None:
            self.bound = (1 + config.tolerance) * loss
        self.retain_weight = self.dual
        figures.update(dual=self.dual, retain_excess=loss - self.bound)
        if self.rounds_done >= config.warmup_rounds:
            self.dual = max(0.0, self.dual + config.dual_rate * (loss - self.bound))
        return super().direction(engine, forget, retain, figures)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "dual": self.dual, "bound": self.bound}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.dual, self.bound = float(state["dual"]), state["bound"]
