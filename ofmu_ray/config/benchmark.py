"""Options of `ofmu benchmark`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ofmu_ray.config.evaluation import EvaluationConfig
from ofmu_ray.config.method_sections import LABELS
from ofmu_ray.config.overrides import apply_overrides, merged, nested
from ofmu_ray.config.ranges import not_negative, positive, require, run_name, seed
from ofmu_ray.config.runs import UnlearnConfig
from ofmu_ray.config.values import close_match
from ofmu_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Compute budget of one run, the same for every method."""

    unit: Literal["flops", "passes"] = "flops"
    """flops: 6 x parameters x tokens; passes: forget and retain gradient passes, whose length differs by method."""
    amount: float = 2e12
    """Budget of one run. A run ends before the round that would exceed it."""
    splits: dict[str, float] = field(default_factory=dict)
    """Split -> its own amount."""

    def __post_init__(self) -> None:
        positive("budget", self, "amount")
        for split, amount in self.splits.items():
            require(amount > 0, f"budget.splits.{split}", amount, "greater than 0")

    def of(self, split: str) -> float:
        """The amount of a split."""
        return self.splits.get(split, self.amount)


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How options are tuned, the same for every method."""

    trials: int = 4
    """Draws from the method's search space (tune_spaces/), per method and split."""
    refine: int = 0
    """Further draws, per method and split, from a quarter of each range around the best of these `trials`."""
    seed: int = 0
    """Seed of the draws and of the tuning runs; must not be one of `seeds`."""
    rows: int | None = 100
    """Rows of each evaluation set for tuning runs, evenly spread; null: all."""
    max_new_tokens: int | None = None
    """Longest generation in tuning runs; 0: no generation (the rule then cannot use model_utility); null: as base."""
    lr_scale: float = 1.0
    """Factor on all learning rates of the search spaces, which are meant for models of 1 B parameters and more."""
    spaces: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """Label or method -> field -> prior, such as loguniform(1e-4, 1e-2); null: not tuned."""

    def __post_init__(self) -> None:
        seed("tuning.seed", self.seed)
        positive("tuning", self, "trials", "rows", "lr_scale")
        not_negative("tuning", self, "refine")


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """Which tuning trial of a method is chosen: the best objective among those with enough utility whose answers to
    forget prompts are not degenerate."""

    objective: str = "forget_quality"
    """Metric (docs/metrics.md). forget_quality and metrics of other rows should be high, KS distance low, the other
    forget metrics close to the retrained model's. Without it, forget_probability and the like should be low, and
    metrics that only that model gives a direction are refused."""
    utility: str = "model_utility"
    """Metric that must not fall below floor x the target's value."""
    floor: float = 0.9
    """Fraction of the target's utility (0 to 1)."""
    margin: float = 0.02
    """Added to the floor when choosing a trial, not when judging reported runs: half of the trials at the floor on a
    sample of rows fall below it on all rows. If no trial reaches floor + margin, the floor alone counts."""

    def __post_init__(self) -> None:
        require(0 <= self.floor <= 1, "rule.floor", self.floor, "in [0, 1]")
        require(0 <= self.margin <= 1, "rule.margin", self.margin, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Variants of one tuned method with the same seeds and budget, not tuned again."""

    of: str = "ofmu_full"
    """Label whose chosen options are the base of the variants; one of `methods`."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> overrides."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """`ofmu benchmark`: methods x splits x seeds at equal compute."""

    name: str = "benchmark"
    """Folder under storage; the same name resumes."""
    storage: str = "runs"
    """Folder for runs, checkpoints and caches; on a cluster, one that all nodes share."""
    methods: list[str] = field(
        default_factory=lambda: ["gradient_ascent", "grad_diff", "npo", "ofmu_full", "ofmu_lite"]
    )
    """Labels: the methods, ofmu_full, ofmu_lite and those of `labels`."""
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    """More labels: overrides of `base`, such as {npo_kl: {method: npo, npo.retain_loss: kl}}."""
    splits: dict[str, dict[str, Any]] = field(default_factory=lambda: {"people": {}})
    """Split -> overrides of `base`: its rows and its retrained model."""
    base: UnlearnConfig = field(default_factory=UnlearnConfig)
    """Common options of all runs (base.name, base.storage, base.seed and training.rounds are not used)."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Compute of one run."""
    tuning: TuningConfig = field(default_factory=TuningConfig)
    """How each method's options are chosen."""
    rule: RuleConfig = field(default_factory=RuleConfig)
    """Which tuning trial is chosen."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds of the reported runs (batch order and the method's random numbers)."""
    ablation: AblationConfig = field(default_factory=AblationConfig)
    """Variants of one chosen method."""
    concurrency: int | None = None
    """Concurrent runs; null: as many as fit, by base.training.cpus_per_worker (gpus_per_worker)."""
    retry_failed: bool = False
    """Repeat runs that an earlier start of this benchmark recorded as failed."""

    def __post_init__(self) -> None:
        run_name(self.name)
        for value in self.seeds:
            seed("seeds", value)
        positive("benchmark", self, "concurrency")
        for name in ("methods", "splits", "seeds"):
            require(bool(getattr(self, name)), name, getattr(self, name), "given: at least one")
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            require(len(set(values)) == len(values), name, values, "without repetitions")
        if self.tuning.seed in self.seeds:
            raise UserError(f"tuning.seed = {self.tuning.seed}: must not be one of seeds = {self.seeds}")
        self._check_labels()
        for split in self.budget.splits:
            if split not in self.splits:
                raise UserError(f"budget.splits: no split {split!r}.{close_match(split, self.splits)}")
        for split in self.splits:
            for label in (*self.methods, *self.ablation.variants):
                self.run(split, label)

    def _check_labels(self) -> None:
        known = {**LABELS, **self.labels}
        named = [("methods", label) for label in self.methods]
        named += [("tuning.spaces", label) for label in self.tuning.spaces]
        for option, label in named:
            if label not in known:
                raise UserError(f"{option}: no method {label!r}.{close_match(label, known)} Known: {', '.join(known)}")
        if self.ablation.variants and self.ablation.of not in self.methods:
            hint = close_match(self.ablation.of, self.methods)
            raise UserError(f"ablation.of = {self.ablation.of!r}: must be one of methods.{hint}")
        for variant in self.ablation.variants:
            if variant in known:
                raise UserError(f"ablation.variants: {variant!r} is the label of a method; choose another name")

    def run(self, split: str, label: str, overrides: Mapping[str, Any] | None = None) -> UnlearnConfig:
        """The configuration of a run of a method on a split (or of a variant, on top of `overrides`)."""
        rows = merged({"evaluation": _auto(self.base.evaluation)}, nested(self.splits[split]))
        base = apply_overrides(self.base, rows, option=f"{split}: ")
        variant = self.ablation.variants.get(label)
        method = label if variant is None else self.ablation.of
        config = apply_overrides(base, {**LABELS, **self.labels}[method], option=f"{method}: ")
        config = apply_overrides(config, overrides or {}, option=f"{method}: ")
        return config if variant is None else apply_overrides(config, variant, option=f"{label}: ")


def _auto(evaluation: EvaluationConfig) -> dict[str, Any]:
    """Overrides that turn options resolved to the built-in rows back into `auto`: a split may have other rows."""
    builtin, plain = UnlearnConfig().evaluation, EvaluationConfig()

    def same(value: Any, resolved: Any, default: Any) -> dict[str, Any]:
        names = [entry.name for entry in fields(default) if getattr(default, entry.name) == "auto"]
        return {name: "auto" for name in names if getattr(value, name) == getattr(resolved, name)}

    return {**same(evaluation, builtin, plain), "sets": same(evaluation.sets, builtin.sets, plain.sets)}
