"""SalUn: random labels for the weights that forget rows depend on most (Fan et al. 2024, arXiv 2310.12508)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, Ranges
from ofmu_ray.config.ranges import require
from ofmu_ray.errors import UserError
from ofmu_ray.features.protocol import Need
from ofmu_ray.features.saliency import GradientMask
from ofmu_ray.methods.random_labels import RandomLabelsConfig, Relabelling

if MYPY:
    from ofmu_ray.algorithm.space import Vector
    from ofmu_ray.config import UnlearnConfig
    from ofmu_ray.engines.protocol import Engine


@dataclass(frozen=True, kw_only=True)
class SalUnConfig(RandomLabelsConfig):
    """SalUn (Fan et al. 2024, arXiv 2310.12508): random labels, only for the most salient weights."""

    share: float = 0.5
    """Share of the weights that are trained, by the size of the forget loss's gradient (the authors: 0.5)."""

    def check(self, section: str) -> None:
        super().check(section)
        require(0 < self.share <= 1, f"{section}.share", self.share, "in (0, 1]")

    def check_run(self, config: UnlearnConfig) -> None:
        if not config.training.single and config.training.zero_stage == 3:
            raise UserError(
                "method = salun masks whole parameters, which no worker has with training.zero_stage = 3: use stage 2"
            )


class SalUn(Relabelling[SalUnConfig]):
    """As random labels, with the update masked by m = [|grad L_f(theta_0)| is among the largest `share`].

    The gradient is that of all forget rows, before the run. Momentum and weight decay act on the other weights as on
    any with gradient 0.
    """

    name = "salun"
    options = SalUnConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "retain_weight": RETAIN_WEIGHT,
        "share": ("choice(0.3, 0.5, 0.7)", "around the authors' 0.5"),
    }
    mask: Vector | None = None

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*super().needs, Need("forget", GradientMask(self.config.share)))

    def given(self, name: str, engine: Engine, parameters: Mapping[str, Any]) -> None:
        """Bring the mask into the engine's layout: it is the gradient of <m, theta>."""
        from ofmu_ray.features.saliency import as_vector

        self.mask = as_vector(engine, parameters)

    def direction(
        self, engine: Engine, forget: Vector | None, retain: Vector | None, series: dict[str, float]
    ) -> Vector:
        direction = super().direction(engine, forget, retain, series)
        assert self.mask is not None
        return [part.mul_(mask) for part, mask in zip(direction, self.mask, strict=True)]
