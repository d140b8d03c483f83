"""Options of the methods OFMU is compared with: one update a round, from a forget and a retain batch.

Defaults are those of OpenUnlearning (locuslab/open-unlearning, December 2025) unless a field says otherwise; the
learning rates are for models of 1 B parameters and more, small models need larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from ofmu_ray.config.optimizers import OptimizerConfig, SharedBaseConfig
from ofmu_ray.config.ranges import not_negative, positive, require


def peer_optimizer(lr: float) -> OptimizerConfig:
    """OpenUnlearning's: AdamW, weight decay 0.01, one warm-up epoch of ten, then linear decay."""
    return OptimizerConfig(lr=lr, weight_decay=0.01, warmup_fraction=0.1, decay="linear")


@dataclass(frozen=True, kw_only=True)
class OneLoopConfig:
    """What these methods share."""

    optimizer: OptimizerConfig = field(default_factory=lambda: peer_optimizer(1e-5))
    """The optimiser."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of the inner and of the outer loop (only the outer one is stepped)."""
        return self.optimizer, self.optimizer

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        self.optimizer.check(f"{section}.optimizer")


@dataclass(frozen=True, kw_only=True)
class WeightedConfig(OneLoopConfig):
    """forget_weight * forget loss + retain_weight * retain loss."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    retain_weight: float = 1.0
    """alpha, weight of the retain loss; 0: no retain pass at all."""
    retain_loss: Literal["nll", "kl"] = "nll"
    """nll: mean token NLL of retain answers; kl: KL(untouched model || model) at the tokens of retain answers."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "forget_weight", "retain_weight")
        require(self.forget_weight + self.retain_weight > 0, f"{section}.forget_weight", 0, "more, or retain_weight")


@dataclass(frozen=True, kw_only=True)
class GradientAscentConfig(OneLoopConfig):
    """Gradient ascent on the forget loss (Jang et al. 2023, arXiv 2210.01504); retain rows are not used."""


@dataclass(frozen=True, kw_only=True)
class GradDiffConfig(WeightedConfig):
    """Gradient difference (Liu et al. 2022, arXiv 2203.12817): ascent on forget, descent on retain rows."""


@dataclass(frozen=True, kw_only=True)
class NPOConfig(WeightedConfig):
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868)."""

    beta: float = 0.1
    """Inverse temperature; towards 0 it becomes gradient ascent."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta")


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
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta")


@dataclass(frozen=True, kw_only=True)
class RMUConfig(OneLoopConfig):
    """Representation misdirection (Li et al. 2024, arXiv 2403.03218): a layer towards a random vector."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    retain_weight: float = 1.0
    """alpha, weight of the distance to the untouched model's activations on retain answers."""
    layer: int | None = None
    """Layer whose output is steered, from 0; null: 7 (OpenUnlearning), or the middle layer of a model with fewer."""
    steering: float = 2.0
    """c, norm of the random target vector."""
    train_layers: int | None = None
    """Train the last n layers up to `layer` only (the authors use 3); null: all weights up to it (OpenUnlearning)."""
    reduction: Literal["row_mean", "peer_broadcast"] = "row_mean"
    """row_mean: mean over rows of each row's mean over tokens; peer_broadcast: as OpenUnlearning computes it."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "forget_weight", "retain_weight", "layer")
        positive(section, self, "steering", "train_layers")


@dataclass(frozen=True, kw_only=True)
class IDKConfig(WeightedConfig):
    """Descent on refusals as answers to forget questions (TOFU's IDK baseline, Maini et al. 2024, arXiv 2401.06121)."""

    refusals: str | None = None
    """JSON Lines with a column `answer`, one refusal a row; null: the built-in list."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(WeightedConfig):
    """Direct preference optimisation of refusals over forget answers (TOFU's DPO baseline)."""

    beta: float = 0.1
    """Inverse temperature."""
    refusals: str | None = None
    """JSON Lines with a column `answer`, one refusal a row; null: the built-in list."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta")


@dataclass(frozen=True, kw_only=True)
class AltPOConfig(WeightedConfig):
    """AltPO (Mekala et al. 2024, arXiv 2409.13474): DPO of the model's own alternative answers over forget answers."""

    beta: float = 0.1
    """Inverse temperature of the loss."""
    alternatives: int = 5
    """Alternatives drawn of each forget row before the first round (the authors: 5); an epoch uses one of them."""
    temperature: float | None = None
    """Temperature they are drawn at; null: 1 with `prompt` (as the authors), else 2: at 1, fitted models repeat it."""
    top_k: int = 50
    """Tokens they are drawn from, the likeliest ones (transformers' default, which the authors leave)."""
    max_new_tokens: int = 200
    """Longest alternative, tokens (the authors: 200)."""
    prompt: str | None = None
    """What the model is asked for an alternative, with {question} and {answer}; null: the question alone."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta", "alternatives", "temperature", "top_k", "max_new_tokens")
        told = self.prompt is None or "{question}" in self.prompt
        require(told, f"{section}.prompt", self.prompt, "a text with {question} in it")


@dataclass(frozen=True, kw_only=True)
class UNDIALConfig(WeightedConfig):
    """Self-distillation from adjusted logits (Dong et al. 2024, arXiv 2402.10052)."""

    optimizer: OptimizerConfig = field(default_factory=lambda: peer_optimizer(1e-4))
    """The optimiser."""
    retain_weight: float = 0.0
    """alpha, weight of the retain loss; 0: no retain pass at all."""
    beta: float = 10.0
    """What is subtracted from the untouched model's logit of each answer token."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "beta")


@dataclass(frozen=True, kw_only=True)
class WGAConfig(WeightedConfig):
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): token losses times p^beta."""

    beta: float = 1.0
    """Exponent of the token's probability in its (detached) weight."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "beta")


@dataclass(frozen=True, kw_only=True)
class SatImpConfig(WeightedConfig):
    """Saturation and importance weights (Yang et al. 2025, arXiv 2505.11953): token losses times p^b1 (1 - p)^b2."""

    forget_weight: float = 0.1
    """gamma, weight of the forget loss."""
    beta1: float = 5.0
    """Exponent of p (saturation)."""
    beta2: float = 1.0
    """Exponent of 1 - p (importance)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "beta1", "beta2")


@dataclass(frozen=True, kw_only=True)
class CEUConfig(OneLoopConfig):
    """CE-U (Yang 2025, arXiv 2503.01224): distillation from the model's own distribution without the true token."""

    skip_tokens: int = 1
    """Leading answer tokens without a loss (a footnote of the paper)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        not_negative(section, self, "skip_tokens")


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


@dataclass(frozen=True, kw_only=True)
class TaskArithmeticConfig(OneLoopConfig):
    """The negated task vector (Ilharco et al. 2023, arXiv 2212.04089): away from a fit to the forget rows."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """The optimiser of the fit (no weight decay: it would pull the unlearned weights, not the fitted ones)."""
    scale: float = 1.0
    """How far to go: the weights are theta_0 - scale (theta_fit - theta_0)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "scale")
        decay = self.optimizer.weight_decay
        require(decay == 0, f"{section}.optimizer.weight_decay", decay, "0 (it would not act on the fitted weights)")


@dataclass(frozen=True, kw_only=True)
class RetainFinetuneConfig(OneLoopConfig):
    """Fine-tuning on retain rows only: what forgetting costs nothing to get."""


@dataclass(frozen=True, kw_only=True)
class BLURConfig(OneLoopConfig):
    """BLUR (Reisizadeh et al. 2025, arXiv 2506.08164): bi-level, forgetting first; the retain gradient is projected."""

    forget_loss: Literal["npo", "nll"] = "npo"
    """Lower-level objective: NPO (BLUR-NPO) or the negated NLL."""
    npo_beta: float = 0.1
    """Inverse temperature of the NPO loss."""
    forget_weight: float = 1.0
    """gamma, weight of the forget gradient beside the projected retain gradient (the authors' MUSE runs: 1)."""

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "npo_beta", "forget_weight")


@dataclass(frozen=True, kw_only=True)
class DualOptimConfig(WeightedConfig):
    """DualOptim+ (Zhong et al. 2026, arXiv 2605.21539): forget and retain steps in turn, an optimiser state each.

    Defaults are those of its TOFU configuration (CityU-MLO/DualOptimPlus, config/phi1-5_tofu.yaml).
    """

    optimizer: OptimizerConfig = field(default_factory=lambda: replace(peer_optimizer(1e-5), beta2=0.95))
    """The optimiser of the retain steps; that of the forget steps differs in its rate only. adamw."""
    forget_weight: float = 0.1
    """gamma, weight of the forget loss."""
    forget_lr_ratio: float = 1.0
    """Learning rate of the forget steps, as a multiple of optimizer.lr."""
    retain_steps: int = 5
    """Retain steps after each forget step."""
    forget_loss: Literal["entropy", "npo", "nll"] = "entropy"
    """entropy: KL(uniform || model) at forget answers' tokens (ME); npo: NPO's loss; nll: the negated NLL."""
    npo_beta: float = 0.1
    """Inverse temperature of the NPO loss."""
    shared_base: bool = True
    """Both states are what is left of a common one; false: DualOptim (arXiv 2504.15827), nothing in common."""
    base_beta1: float = 0.99
    """First-moment decay of the common state."""
    base_beta2: float = 0.999
    """Second-moment decay of the common state."""

    @property
    def optimizers(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """Of forget (inner) and of retain steps (outer)."""
        if not self.shared_base:
            return self.optimizer, self.optimizer
        own = {name.name: getattr(self.optimizer, name.name) for name in fields(OptimizerConfig)}
        shared = SharedBaseConfig(**own, base_beta1=self.base_beta1, base_beta2=self.base_beta2)
        return shared, shared

    def check(self, section: str) -> None:
        """Ranges; UnlearnConfig calls it with the section's name."""
        super().check(section)
        positive(section, self, "forget_weight", "retain_weight", "forget_lr_ratio", "retain_steps", "npo_beta")
        for name in ("base_beta1", "base_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{section}.{name}", value, "at least 0 and less than 1")
        rule = self.optimizer.name
        require(rule == "adamw" or not self.shared_base, f"{section}.optimizer.name", rule, "adamw, or no shared_base")
