"""Options of OFMU, its presets, and its search space."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ofmu_ray.config.methods import MYPY, MethodConfig, Ranges
from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import not_negative, positive, require
from ofmu_ray.errors import UserError

if MYPY:
    import numpy as np

    from ofmu_ray.config import ModelConfig, UnlearnConfig
    from ofmu_ray.data.prepare import PreparedData
    from ofmu_ray.features.value_tables import Missing

PresetName = Literal["first_order", "lite", "full"]
ForgetLoss = Literal["nll", "matched_row", "bounded_row", "bounded_token", "npo", "simnpo"]
BOUNDED: tuple[ForgetLoss, ...] = ("matched_row", "bounded_row", "bounded_token")
"""Forget losses that are bounded by a level."""


@dataclass(frozen=True, kw_only=True)
class OFMUConfig(MethodConfig):
    """OFMU's two loops (arXiv 2509.22483, Algorithm 1). Costs per round: docs/method.md."""

    preset: PresetName = "lite"
    """Named set of defaults: first_order, lite or full. first_order: one pass per update, a bounded forget loss; lite:
    1.7 passes; full: the paper's step, 4.7."""
    forget_loss: ForgetLoss = "nll"
    """Loss that the inner loop raises on forget answers. nll: the token NLL, unbounded; bounded_token: each token's NLL
    up to forget_level; bounded_row: each row's mean NLL up to forget_level; matched_row: the same, and down to it where
    steps overshot, token by token where they ran away; npo, simnpo: the negated losses of these methods, whose
    gradients fade out."""
    forget_level: float | str | None = None
    """Bound of bounded losses: nats per token; holdout: the reference model's mean loss on the rows of data.holdout;
    holdout:Q: quantile Q (0 to 1) of these rows' losses; unigram: entropy of the tokens of retain answers. null:
    holdout if data.holdout is set, else unigram."""
    level_model: str | None = None
    """Reference model for a level from holdout rows; null: model.path. If model.path is itself unlearned, name the
    model that its first run started from: each run also raises the loss of unseen rows a little."""
    forget_beta: float = 0.1
    """Inverse temperature of forget_loss npo (0.1 in its paper) and simnpo."""
    projection: float = 0.0
    """Share of g_f's conflict with the retain loss that is removed from an inner step: its component along the outer
    optimiser's first moment, if that raises the retain loss (0: none, 1: all; needs outer.name adamw)."""
    beta: float = 0.1
    """Weight of the similarity term in the inner objective Phi = L_f - beta * Sim(g_f, g_r)."""
    inner_steps: int = 5
    """T, ascent steps on Phi per round (paper: 5 to 10)."""
    outer_steps: int = 1
    """S, outer steps per round (paper: 1). Only the first includes the penalty; the others descend the retain loss."""
    rho: float = 0.001
    """rho_0, weight of the penalty |grad Phi|^2 in the outer objective (0: no penalty)."""
    rho_growth: float = 1.05
    """gamma of the schedule rho_k = min(rho_max, rho * gamma^k)."""
    rho_max: float | None = None
    """Bound of the schedule; null: ten times rho."""
    similarity: Literal["cosine", "squared_cosine"] = "cosine"
    """Sim: the paper's cosine, or its square (which also pushes negative cosines to zero)."""
    curvature: Literal["finite_difference", "exact"] = "finite_difference"
    """Hessian-vector products: differences of gradients (every engine) or double backward (engine torch only)."""
    difference: Literal["auto", "forward", "central"] = "auto"
    """Finite differences: forward (one extra pass each), central (two, more accurate), or auto: central for products
    whose forward difference has an estimated error above 0.5 %."""
    relative_step: float | None = None
    """Norm of the displacement relative to that of the weights, fixed (auto is then forward); null: chosen per product
    from measured rounding error and curvature."""
    step_check_every: int = 20
    """Rounds between these measurements (4 to 12 passes per product, counted as cost); sooner if a gradient's norm
    changes fourfold."""
    penalty_curvature: Literal["full", "forget", "none"] = "forget"
    """Curvature in the penalty's gradient 2 rho (Hess Phi)(grad Phi): of Phi, of L_f alone, or no penalty."""
    decorrelate_every: int | None = None
    """Refresh grad Sim every n inner steps and reuse it in between (1: every step; null: once per round)."""
    reuse_retain_gradient: bool = True
    """Reuse the retain side of the similarity (g_r and H_r w) from its first refresh for the rest of the round."""
    reuse_forget_gradient: bool = True
    """With penalty_curvature forget: take the penalty at the last inner iterate, whose g_f is already known."""
    inner: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(decay="linear"))
    """Optimiser of the inner loop (ascent on Phi)."""
    outer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser of the outer loop (descent on F = L_r + rho |grad Phi|^2), with its own state."""
    outer_ratio: float | None = None
    """Learning rate of the outer loop over that of the inner loop, unless outer.lr is set."""
    shared_optimizer: bool = False
    """Both loops use the inner loop's optimiser (moments, clipping, decay), each at its own learning rate: an
    ablation of the separate states."""

    def __post_init__(self) -> None:
        not_negative("ofmu", self, "beta", "rho")
        positive("ofmu", self, "inner_steps", "outer_steps", "decorrelate_every")
        positive("ofmu", self, "rho_growth", "rho_max", "relative_step", "step_check_every")
        positive("ofmu", self, "forget_beta", "outer_ratio")
        require(0 <= self.projection <= 1, "ofmu.projection", self.projection, "in [0, 1]")
        self.inner.check("ofmu.inner")
        self.outer.check("ofmu.outer")
        self._check_projection()
        check_level(self.forget_level)
        if self.relative_step is not None:
            require(self.relative_step <= 0.1, "ofmu.relative_step", self.relative_step, "at most 0.1")
        if self.rho_max is not None:
            require(self.rho_max >= self.rho, "ofmu.rho_max", self.rho_max, f"at least ofmu.rho ({self.rho:g})")

    @property
    def bounded(self) -> bool:
        """Whether the forget loss is bounded by a level."""
        return self.forget_loss in BOUNDED

    @property
    def level(self) -> float | None:
        """`forget_level` in nats per token, once it is a number (`completed`); None: no bound."""
        level = self.forget_level
        return float(level) if self.bounded and isinstance(level, int | float) else None

    @property
    def level_from_holdout(self) -> bool:
        """Whether holdout rows determine the forget level, if there are any."""
        level = self.forget_level
        return self.bounded and (level is None or str(level).startswith("holdout"))

    @property
    def streams(self) -> frozenset[str]:
        """Includes holdout rows if they determine the forget level."""
        return super().streams | ({"holdout"} if self.level_from_holdout else set())

    @property
    def models(self) -> dict[str, str]:
        return {"ofmu.level_model": self.level_model} if self.level_model and self.level_from_holdout else {}

    def for_sequence(self, first: str) -> OFMUConfig:
        """With `first` as `level_model`, if holdout rows set the level."""
        unset = self.level_from_holdout and self.level_model is None
        return dataclasses.replace(self, level_model=first) if unset else self

    def check_run(self, config: UnlearnConfig) -> None:
        self._check_curvature(config)
        level = self.forget_level
        needs_holdout = isinstance(level, str) and level.startswith("holdout") and self.bounded
        if needs_holdout and "holdout" not in config.data.sources:
            raise UserError(
                f"ofmu.forget_level = {level!r}: it needs rows that the model never saw; set data.holdout, "
                "or give the level in nats per token"
            )

    def completed(
        self, prepared: PreparedData, model: ModelConfig, cache: str, left: list[Missing] | None = None
    ) -> OFMUConfig:
        """A copy with `forget_level` in nats per token, if the loss is bounded; or as a word, if workers measure it."""
        if not self.bounded:
            return self
        level = self.forget_level
        if level is None:
            level = "holdout" if "holdout" in prepared.streams else "unigram"
        if isinstance(level, str):
            from ofmu_ray.features.level import measured

            value = measured(level, prepared, model, cache, left, self.level_model)
            level = level if value is None else value
        return dataclasses.replace(self, forget_level=level if isinstance(level, str) else float(level))

    def with_level(self, losses: np.ndarray) -> OFMUConfig:
        """A copy with the `forget_level` of holdout rows with these losses."""
        from ofmu_ray.features.level import level_of

        return dataclasses.replace(self, forget_level=level_of(str(self.forget_level), losses))

    @property
    def remarks(self) -> dict[str, str]:
        if not self.bounded:
            return {}
        level = "the loss of holdout rows" if self.level is None else f"{self.level:.3g} nats per token"
        return {"level": f"forget up to {level} ({self.forget_loss})"}

    @property
    def penalises(self) -> bool:
        """Whether outer steps include the penalty."""
        return self.rho > 0 and self.penalty_curvature != "none"

    def _check_curvature(self, config: UnlearnConfig) -> None:
        differenced = self.beta > 0 or self.penalises
        if differenced and self.curvature == "finite_difference" and config.model.precision == "bf16":
            raise UserError(
                "model.precision = bf16 with ofmu.curvature = finite_difference: differences of gradients at weights "
                "that are rounded to bf16 are mostly noise (docs/precision.md); use --model.precision bf16_autocast, "
                "or disable similarity and penalty: --ofmu.beta 0 --ofmu.rho 0"
            )
        exact = self.curvature == "exact"
        if exact and not config.training.single:
            raise UserError(
                "ofmu.curvature = exact needs double backward, which DeepSpeed does not offer on sharded models: "
                "use --training.engine torch (one worker) or --ofmu.curvature finite_difference"
            )
        if exact and config.model.attention != "eager":
            raise UserError(
                "ofmu.curvature = exact: fused attention has no double backward; add --model.attention eager"
            )
        if exact and config.model.gradient_checkpointing:
            raise UserError(
                "ofmu.curvature = exact cannot run with gradient checkpointing: "
                "set --model.gradient_checkpointing false or --ofmu.curvature finite_difference"
            )

    def _check_projection(self) -> None:
        if self.projection and self.outer.name != "adamw":
            raise UserError(
                f"ofmu.projection = {self.projection:g} needs the first moment of ofmu.outer.name adamw; set it to 0 "
                f"with {self.outer.name}"
            )
        if self.projection and self.shared_optimizer:
            raise UserError(
                "ofmu.projection needs a first moment of retain gradients alone: set ofmu.shared_optimizer false"
            )

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """For the inner and the outer loop; outer_ratio sets the outer rate if outer.lr is not set."""
        if self.outer_ratio is None or self.outer.lr is not None or self.inner.lr is None:
            return self.inner, self.outer
        return self.inner, dataclasses.replace(self.outer, lr=self.outer_ratio * self.inner.lr)

    @property
    def without_rate(self) -> list[str]:
        return [name for name in super().without_rate if name == "inner" or self.outer_ratio is None]

    @classmethod
    def default(cls) -> OFMUConfig:
        return cls.from_preset("first_order")

    @classmethod
    def from_preset(cls, preset: PresetName, **overrides: Any) -> OFMUConfig:
        """The preset's options with named fields overridden."""
        return cls(**{"preset": preset, **PRESETS[preset], **overrides})


_PAPER = {
    "forget_loss": "nll",
    "projection": 0.0,
    "beta": 0.1,
    "rho": 0.001,
    "inner_steps": 5,
    "outer_steps": 1,
    "outer_ratio": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    # one gradient per update: T + S passes per round
    "first_order": {
        "forget_loss": "matched_row",
        "projection": 0.0,
        "beta": 0.0,
        "rho": 0.0,
        "inner_steps": 3,
        "outer_steps": 8,
        "outer_ratio": 0.45,
    },
    # grad Sim and g_r once per round, penalty curvature from L_f alone: 7 forget + 3 retain passes for 6 updates
    "lite": {
        **_PAPER,
        "penalty_curvature": "forget",
        "decorrelate_every": None,
        "reuse_retain_gradient": True,
        "reuse_forget_gradient": True,
    },
    # the paper's step: all derivatives fresh, 14 forget + 14 retain passes for 6 updates
    "full": {
        **_PAPER,
        "penalty_curvature": "full",
        "decorrelate_every": 1,
        "reuse_retain_gradient": False,
        "reuse_forget_gradient": False,
    },
}


def check_level(level: float | str | None) -> None:
    """Raise UserError for a forget_level that is neither a number of nats nor a keyword."""
    option, shape = "ofmu.forget_level", "nats per token above 0, holdout, holdout:QUANTILE, or unigram"
    if isinstance(level, str):
        word, _, quantile = level.partition(":")
        try:
            good = level in ("holdout", "unigram") or (word == "holdout" and 0 < float(quantile) < 1)
        except ValueError:
            good = False
        require(good, option, level, shape)
    elif level is not None:
        require(level > 0, option, level, shape)


SPACE: Ranges = {
    "inner.lr": (
        "loguniform(2e-5, 1e-4)",
        "the upper end of the other methods' range: the bounded loss makes large rates safe, and no smaller one "
        "forgot anything on TOFU forget05 (docs/decisions.md)",
    ),
    "outer_ratio": ("loguniform(0.3, 0.65)", "good draws had 0.3 to 0.6 (docs/decisions.md)"),
}
