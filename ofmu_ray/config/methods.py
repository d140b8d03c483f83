"""Options of the unlearning methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ofmu_ray.config import baselines
from ofmu_ray.config.optimizers import OptimizerConfig
from ofmu_ray.config.ranges import not_negative, positive, require

PresetName = Literal["full", "lite"]


@dataclass(frozen=True, kw_only=True)
class OFMUConfig:
    """OFMU's two loops (arXiv 2509.22483, Algorithm 1). Costs per round are in the cost table of docs/method.md."""

    preset: PresetName = "lite"
    """Named set of options that the others override: full (the paper's step) or lite (1.7 passes an update)."""
    beta: float = 0.1
    """Weight of the similarity term in the inner objective Phi = L_f - beta * Sim(g_f, g_r)."""
    inner_steps: int = 5
    """T, ascent steps on Phi per round (paper: 5 to 10)."""
    outer_steps: int = 1
    """Outer steps per round (paper: 1). Only the first carries the penalty; the others descend the retain loss."""
    rho: float = 0.001
    """rho_0, weight of the penalty |grad Phi|^2 in the outer objective (0: no penalty)."""
    rho_growth: float = 1.05
    """gamma of the schedule rho_{k+1} = gamma * rho_k."""
    similarity: Literal["cosine", "squared_cosine"] = "cosine"
    """Sim: the paper's cosine, or its square (which also pushes negative cosines to zero)."""
    curvature: Literal["finite_difference", "exact"] = "finite_difference"
    """Hessian-vector products: differences of gradients (every engine) or double backward (engine torch only)."""
    difference: Literal["forward", "central"] = "forward"
    """Finite differences: forward (one extra pass each) or central (two, more exact)."""
    relative_step: float | None = None
    """Norm of the displacement relative to the norm of the weights; null: measured default per precision."""
    penalty_curvature: Literal["full", "forget", "none"] = "forget"
    """Curvature in the penalty's gradient 2 rho (Hess Phi)(grad Phi): of Phi, of L_f alone, or no penalty at all."""
    decorrelate_every: int | None = None
    """Refresh grad Sim every n inner steps and hold it in between (1: each step; null: once a round)."""
    reuse_retain_gradient: bool = True
    """Hold the retain side of the similarity (g_r and H_r w) from its first refresh for the rest of the round."""
    reuse_forget_gradient: bool = True
    """With penalty_curvature forget: take the penalty at the last inner iterate, whose g_f is already there."""
    inner: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Optimiser of the inner loop (ascent on Phi)."""
    outer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Optimiser of the outer loop (descent on F = L_r + rho |grad Phi|^2); its state is its own."""
    shared_optimizer: bool = False
    """Both loops step the inner loop's optimiser (moments, clipping, decay), each at its own learning rate: an
    ablation of the separate states."""

    def __post_init__(self) -> None:
        not_negative("ofmu", self, "beta", "rho")
        positive("ofmu", self, "inner_steps", "outer_steps", "rho_growth", "relative_step", "decorrelate_every")
        self.inner.check("ofmu.inner")
        self.outer.check("ofmu.outer")
        if self.relative_step is not None:
            require(self.relative_step <= 0.1, "ofmu.relative_step", self.relative_step, "at most 0.1")

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop."""
        return self.inner, self.outer

    @classmethod
    def from_preset(cls, preset: PresetName, **overrides: Any) -> OFMUConfig:
        """The preset's options with named fields overridden."""
        return cls(**{"preset": preset, **PRESETS[preset], **overrides})


PRESETS: dict[PresetName, dict[str, Any]] = {
    # the paper's step: every derivative fresh, 14 forget + 14 retain passes for 6 updates
    "full": {
        "penalty_curvature": "full",
        "decorrelate_every": 1,
        "reuse_retain_gradient": False,
        "reuse_forget_gradient": False,
    },
    # grad Sim and g_r once a round, penalty curvature from L_f alone: 7 forget + 3 retain passes for 6 updates
    "lite": {
        "penalty_curvature": "forget",
        "decorrelate_every": None,
        "reuse_retain_gradient": True,
        "reuse_forget_gradient": True,
    },
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Plain fitting of a data set (`ofmu train`)."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-3, weight_decay=0.01, warmup_fraction=0.05, decay="cosine")
    )
    """Optimiser of the fit."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop (only the outer one is stepped)."""
        return self.optimizer, self.optimizer

    def __post_init__(self) -> None:
        self.optimizer.check("finetune.optimizer")


MethodName = Literal[
    "ofmu",
    "gradient_ascent",
    "grad_diff",
    "npo",
    "simnpo",
    "rmu",
    "idk",
    "dpo",
    "altpo",
    "undial",
    "wga",
    "satimp",
    "ceu",
    "pdu",
    "task_arithmetic",
    "retain_finetune",
    "blur",
    "dualoptim",
]

MethodConfig = OFMUConfig | FinetuneConfig | baselines.OneLoopConfig
"""Options of any method."""

METHODS: dict[MethodName, type[OFMUConfig] | type[baselines.OneLoopConfig]] = {
    "ofmu": OFMUConfig,
    "gradient_ascent": baselines.GradientAscentConfig,
    "grad_diff": baselines.GradDiffConfig,
    "npo": baselines.NPOConfig,
    "simnpo": baselines.SimNPOConfig,
    "rmu": baselines.RMUConfig,
    "idk": baselines.IDKConfig,
    "dpo": baselines.DPOConfig,
    "altpo": baselines.AltPOConfig,
    "undial": baselines.UNDIALConfig,
    "wga": baselines.WGAConfig,
    "satimp": baselines.SatImpConfig,
    "ceu": baselines.CEUConfig,
    "pdu": baselines.PDUConfig,
    "task_arithmetic": baselines.TaskArithmeticConfig,
    "retain_finetune": baselines.RetainFinetuneConfig,
    "blur": baselines.BLURConfig,
    "dualoptim": baselines.DualOptimConfig,
}
"""Method -> its options, which stand in the section of the same name."""
