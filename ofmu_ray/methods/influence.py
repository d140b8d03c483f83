"""Influence unlearning: a step that undoes the forget rows' influence (Izzo et al. 2021, arXiv 2002.10077).

Influence functions: Koh & Liang 2017 (arXiv 1703.04730). Inverse of the Fisher matrix: WoodFisher (Singh & Alistarh
2020, arXiv 2004.14340). As a baseline of vision: Jia et al. 2023 (arXiv 2304.04934).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ofmu_ray.config.methods import MYPY, MethodConfig, Ranges
from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.features.protocol import Need
from ofmu_ray.methods.protocol import Batches, Method, drawn

if MYPY:
    import torch

    from ofmu_ray.algorithm.space import Vector
    from ofmu_ray.config import ModelConfig
    from ofmu_ray.data.prepare import PreparedData
    from ofmu_ray.engines.protocol import Engine
    from ofmu_ray.features.value_tables import Missing

MOVE = OptimizerConfig(name="sgd", lr=1.0, clip=None)
"""theta minus the vector."""


@dataclass(frozen=True, kw_only=True)
class InfluenceConfig(MethodConfig):
    """Influence unlearning (Izzo et al. 2021, arXiv 2002.10077): one step that undoes the forget rows' influence."""

    alpha: float = 0.2
    """Length of the step (OPTML-Group/Unlearn-Saliency: 0.2); 1: what the theory says."""
    damping: float = 1.0
    """lambda, added to the diagonal of the Fisher matrix (the same code: 1)."""
    gradients: int = 16
    """m, retain batches whose gradients make the Fisher matrix. Each is kept: a copy of the weights' size."""
    forget_share: float | None = None
    """Forget rows as a share of all rows; null: counted."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        return MOVE, MOVE

    def check(self, section: str) -> None:
        positive(section, self, "alpha", "damping", "gradients")
        if self.forget_share is not None:
            require(0 < self.forget_share <= 1, f"{section}.forget_share", self.forget_share, "in (0, 1]")

    def completed(
        self, prepared: PreparedData, model: ModelConfig, cache: str, left: list[Missing] | None = None
    ) -> InfluenceConfig:
        """A copy with `forget_share`."""
        if self.forget_share is not None:
            return self
        forget, retain = (prepared.streams[name].used_rows for name in ("forget", "retain"))
        return replace(self, forget_share=forget / (forget + retain))


class Influence(Method):
    """theta = theta_0 + alpha s H^-1 (grad L_f - grad L_r), both means at theta_0; s: the forget rows' share.

    A round adds one forget and one retain batch to the means, and the retain gradient g_j to H, the damped empirical
    Fisher matrix, as one of its first m. After n rounds, with k = min(n, m) and G = (<g_i, g_j>),

        H = lambda I + 1/k sum_j g_j g_j^T
        H^-1 v = (v - sum_j c_j g_j) / lambda,  c = (lambda k I + G)^-1 (<g_j, v>)

    by Woodbury's identity. The weights are theta after every round, so a run may end after any; gradients are taken at
    theta_0. A batch of one row gives the Fisher matrix of rows, a larger one about a batch size less of it.

    OPTML-Group/Unlearn-Saliency (Wfisher.py) has a recursion over 1,000 rows in two vectors. The second never takes in
    a new gradient, so its H^-1 v is v minus a multiple of the first row's gradient. Here H is inverted exactly.
    """

    name = "influence"
    options = InfluenceConfig
    space: ClassVar[Ranges] = {
        "alpha": (
            "loguniform(0.2, 20)",
            "from the 0.2 of Unlearn-Saliency two decades up: its step hardly moves the digits' model",
        ),
        "damping": ("loguniform(0.1, 1)", "the 1 of Unlearn-Saliency and a decade below, where the step is longer"),
    }
    asks: frozenset[str] = frozenset()
    notes: Sequence[str] = ()

    def __init__(self, config: InfluenceConfig, rounds: int | None = None):
        self.config = config
        self.most = min(config.gradients, rounds or config.gradients)
        self.rounds_done = 0
        self.gram: list[list[float]] = []
        """<g_i, g_j>, j up to i."""
        self.start_weights: Vector = []

    @property
    def needs(self) -> tuple[Need, ...]:
        return ()

    def freeze(self, module: torch.nn.Module) -> None:
        """Nothing: all weights move."""

    def start(self, engine: Engine) -> None:
        """Save theta_0, and allocate all vectors at once, so that a run that fits does so to its end."""
        import torch

        self.start_weights = engine.weights()
        for name in ("difference", *map(_gradient, range(self.most))):
            engine.kept[name] = [torch.zeros_like(part) for part in self.start_weights]

    def batches_per_round(self) -> dict[str, int]:
        return {"forget": 1, "retain": 1}

    def round(self, engine: Engine, forget_batches: Batches, retain_batches: Batches) -> dict[str, float]:
        """Better estimates and the step anew; both losses are those of theta_0, `gradient_norm` is that of the move."""
        from ofmu_ray.algorithm.space import add_, combine, scale_

        away = combine(1.0, self.start_weights, -1.0, engine.weights())
        with engine.displaced(away, 1.0):
            forget, forget_loss = engine.gradient(next(drawn(forget_batches, "forget")), kind="forget")
            retain, retain_loss = engine.gradient(next(drawn(retain_batches, "retain")), kind="retain")
        difference = add_(add_(engine.kept["difference"], forget), retain, -1.0)
        if len(self.gram) < self.most:
            self._keep(engine, retain)
        self.rounds_done += 1
        step = self._solved(engine, difference)
        scale_(step, self.config.alpha * (self.config.forget_share or 1.0) / self.rounds_done)
        norm = engine.apply(scale_(add_(step, away), -1.0), "outer")
        return {"forget_loss": forget_loss, "retain_loss": retain_loss, "gradient_norm": norm}

    def _keep(self, engine: Engine, gradient: Vector) -> None:
        """The next column of the Fisher matrix's root."""
        number = len(self.gram)
        engine.kept[_gradient(number)] = gradient
        self.gram.append(engine.dot(*((engine.kept[_gradient(at)], gradient) for at in range(number + 1))))

    def _solved(self, engine: Engine, vector: Vector) -> Vector:
        """H^-1 vector, in a new vector."""
        import torch

        from ofmu_ray.algorithm.space import add_

        damping, count = self.config.damping, len(self.gram)
        gradients = [engine.kept[_gradient(at)] for at in range(count)]
        gram = torch.tensor([row + [0.0] * (count - len(row)) for row in self.gram], dtype=torch.float64)
        gram = gram + gram.tril(-1).T + damping * count * torch.eye(count, dtype=torch.float64)
        along = torch.tensor(engine.dot(*((gradient, vector) for gradient in gradients)), dtype=torch.float64)
        solved = [part / damping for part in vector]
        for gradient, weight in zip(gradients, torch.linalg.solve(gram, along).tolist(), strict=True):
            add_(solved, gradient, -weight / damping)
        return solved

    def state_dict(self) -> dict[str, Any]:
        return {"rounds_done": self.rounds_done, "gram": self.gram}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds_done = int(state["rounds_done"])
        self.gram = [[float(value) for value in row] for row in state["gram"]]


def _gradient(number: int) -> str:
    """The name of a kept gradient."""
    return f"gradient_{number}"
