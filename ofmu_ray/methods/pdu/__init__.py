"""PDU: primal-dual unlearning (Entesari et al. 2025, arXiv 2506.05314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ofmu_ray.config.method_options import OneLoopConfig
from ofmu_ray.config.ranges import not_negative, positive
from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate


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
    positions: Literal["answer", "peer_unshifted"] = "answer"
    """answer: where answer tokens are predicted; peer_unshifted: one place later (OpenUnlearning's unshifted mask)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "forget_weight", "retain_bound")
        not_negative(section, self, "dual_start", "dual_rate", "tolerance", "warmup_rounds")


OPTIONS = PDUConfig
SPACE = Space(
    (
        rate("pdu.optimizer.lr"),
        Knob("pdu.dual_start", LogUniform(1.0, 100.0), "1 in OpenUnlearning; its documentation advises 50 to 100"),
        Knob("pdu.dual_rate", LogUniform(0.1, 10.0), "a decade around OpenUnlearning's 1"),
    )
)
