"""L1-sparse: fine-tuning on retain rows with a fading L1 penalty (Jia et al. 2023, arXiv 2304.04934)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ofmu_ray.config.methods import MYPY, RATE, OneLoopConfig, Ranges
from ofmu_ray.config.ranges import positive
from ofmu_ray.methods.one_loop import OneLoop

if MYPY:
    from ofmu_ray.algorithm.space import Vector
    from ofmu_ray.engines.protocol import Engine


@dataclass(frozen=True, kw_only=True)
class L1SparseConfig(OneLoopConfig):
    """L1-sparse (Jia et al. 2023, arXiv 2304.04934): fine-tuning on retain rows with a fading L1 penalty."""

    alpha: float = 5e-4
    """Weight of the penalty |theta|_1 in the first round, from where it falls linearly to 0 (the authors: 5e-4)."""

    def check(self, section: str) -> None:
        super().check(section)
        positive(section, self, "alpha")


class L1Sparse(OneLoop[L1SparseConfig]):
    """Minimises L_r + alpha_k |theta|_1, alpha_k = alpha (1 - k / K); forget rows are not used."""

    name = "l1_sparse"
    options = L1SparseConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "alpha": ("loguniform(1e-5, 1e-3)", "around the authors' 5e-4, and down to where it no longer matters"),
    }
    asks = frozenset()
    forget_weight = 0.0
    retain_weight = 1.0

    def direction(
        self, engine: Engine, forget: Vector | None, retain: Vector | None, series: dict[str, float]
    ) -> Vector:
        from ofmu_ray.algorithm.space import add_

        assert retain is not None
        alpha = self.config.alpha * (1 - self.rounds_done / self.rounds if self.rounds else 1.0)
        series["l1_weight"] = alpha
        return add_(retain, [part.sign_() for part in engine.weights()], alpha)
