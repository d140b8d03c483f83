"""Options of `ofmu sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ofmu_ray.config.evaluation import EvaluationConfig
from ofmu_ray.config.method_sections import LABELS
from ofmu_ray.config.overrides import apply_overrides
from ofmu_ray.config.ranges import not_negative, positive, require, run_name, seed
from ofmu_ray.config.runs import UnlearnConfig
from ofmu_ray.config.values import close_match
from ofmu_ray.errors import UserError

SearchKind = Literal["random", "tpe", "multi_objective", "population"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the options of the next trial are chosen."""

    kind: SearchKind = "tpe"
    """random: a Sobol sequence; tpe: Optuna's tree-structured Parzen estimator on the rule of select.*;
    multi_objective: the same on objective and utility (and `cost`) at once; population: population-based training."""
    trials: int = 16
    """Total number of trials; rerun a finished sweep with more to continue it. For population: members times
    generations."""
    seed: int = 0
    """Seed of the search."""
    startup_trials: int = 8
    """tpe and multi_objective: trials of the Sobol sequence before the estimator takes over."""
    cost: bool = False
    """multi_objective: minimise the FLOPs of a run as a third objective."""
    population: int = 4
    """population: members, trained side by side."""
    quantile: float = 0.25
    """population: fraction of members replaced after each generation by copies of the same number of best ones."""

    def __post_init__(self) -> None:
        positive("search", self, "trials", "startup_trials", "population")
        require(0 < self.quantile <= 0.5, "search.quantile", self.quantile, "greater than 0 and at most 0.5")
        if self.cost and self.kind != "multi_objective":
            raise UserError(f"search.cost is for search.kind multi_objective, not {self.kind}")
        if self.kind == "population" and self.trials % self.population:
            raise UserError(
                f"search.trials = {self.trials}: must be a multiple of search.population = {self.population} "
                "(members times generations)"
            )

    @property
    def generations(self) -> int:
        """Generations of a population."""
        return self.trials // self.population


@dataclass(frozen=True, kw_only=True)
class EarlyConfig:
    """Which trials end before their last round (ignored by search.kind population, which replaces its worst)."""

    kind: Literal["none", "asha", "median"] = "asha"
    """asha: asynchronous successive halving (arXiv 1810.05934); median: below the median of the others so far."""
    stages: int = 4
    """Evaluations per run, evenly spread; the last one at its end."""
    grace: int = 1
    """No run ends before this many evaluations."""
    reduction_factor: float = 2.0
    """asha: one in this many goes on at each rung (after grace, grace x factor, ... evaluations)."""
    floor_share: float = 1.0
    """Share of the utility floor that is enough during a run: less than 1 if utility recovers towards the end."""

    def __post_init__(self) -> None:
        positive("early", self, "stages", "grace")
        require(self.reduction_factor > 1, "early.reduction_factor", self.reduction_factor, "greater than 1")
        require(0 <= self.floor_share <= 1, "early.floor_share", self.floor_share, "in [0, 1]")
        if self.kind != "none" and self.grace >= self.stages:
            raise UserError(
                f"early.grace = {self.grace}: must be less than early.stages = {self.stages}, or no run could end "
                "early; set early.kind none to complete all runs"
            )


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which trial is chosen: the best objective among those with enough utility."""

    objective: str = "auto"
    """Metric (docs/metrics.md); auto: forget_quality with a retrained model, else forget_probability. forget_quality
    and metrics of other rows should be high, KS distance low, the other forget metrics close to the retrained model's.
    Without it, forget_probability and the like should be low, and metrics that only that model gives a direction are
    refused."""
    utility: str = "auto"
    """Metric that must not fall below the floor; auto: model_utility if it is measured, else retain_probability."""
    utility_floor: float = 0.9
    """The floor, as a fraction of the reference's utility (0 to 1)."""
    margin: float = 0.02
    """Added to the floor when choosing a trial, if some trial reaches it: half of the trials at the floor on a sample
    fall below it on all rows."""
    relative_to: Literal["target", "retrained"] = "target"
    """The model whose utility counts: the reference model, or the model that never saw the forget rows."""
    tie_break: Literal["cost", "order"] = "cost"
    """Between equal objectives: fewer FLOPs, or the earlier trial."""
    rows: int | None = 100
    """Rows of each evaluation set for trials, evenly spread; null: all."""
    max_new_tokens: int | None = None
    """Longest generation in trials; 0: no generation (the rule then cannot use model_utility); null: as base."""
    seeds: list[int] = field(default_factory=list)
    """Fresh seeds to rerun the chosen options with, for metrics without selection bias."""

    def __post_init__(self) -> None:
        require(0 <= self.utility_floor <= 1, "select.utility_floor", self.utility_floor, "in [0, 1]")
        require(0 <= self.margin <= 1, "select.margin", self.margin, "in [0, 1]")
        for value in self.seeds:
            seed("select.seeds", value)
        positive("select", self, "rows")
        not_negative("select", self, "max_new_tokens")
        require(len(set(self.seeds)) == len(self.seeds), "select.seeds", self.seeds, "without repetitions")
        if self.objective == self.utility != "auto":
            raise UserError(f"select.objective and select.utility are both {self.utility!r}: name two metrics")

    def resolved(self, evaluation: EvaluationConfig) -> SelectConfig:
        """The rule for runs with this evaluation, without `auto`."""
        longest = evaluation.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        whole = longest > 0 and None not in (evaluation.sets.real_authors, evaluation.sets.world_facts)
        quality = "forget_quality" if evaluation.retrained else "forget_probability"
        kept = "model_utility" if whole else "retain_probability"
        return replace(
            self,
            objective=quality if self.objective == "auto" else self.objective,
            utility=kept if self.utility == "auto" else self.utility,
        )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """`ofmu sweep`: tune a method's options by a fixed rule."""

    name: str = "sweep"
    """Folder under storage; the same name resumes."""
    storage: str = "runs"
    """Folder for runs, checkpoints and caches; on a cluster, one that all nodes share."""
    label: str = UnlearnConfig.method
    """What to tune: a method (ofmu: with the preset first_order), ofmu_full or ofmu_lite."""
    base: UnlearnConfig = field(default_factory=UnlearnConfig)
    """Common options of all trials (base.name and base.storage are not used). With rounds of different cost,
    base.stop.max_flops or max_passes give all trials the same budget."""
    space: dict[str, Any] = field(default_factory=dict)
    """Field -> prior, on top of the method's own space (tune_spaces/): --space.ofmu.beta "loguniform(1e-3, 1)"; null:
    not tuned. Priors: uniform, loguniform, integer, choice, zero_or_loguniform."""
    space_file: str | None = None
    """YAML file of priors by field, such as the priors.yaml of an earlier sweep on a smaller model, or a Python file
    with a `SPACE` (it is executed: only name files you trust); `space` still goes on top."""
    lr_scale: float | None = None
    """Factor on all learning rates of the method's own space, which is meant for models of 1 B parameters; null:
    sqrt(1e9 / trained parameters)."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """How options are chosen."""
    early: EarlyConfig = field(default_factory=EarlyConfig)
    """Which trials end early."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which trial is chosen."""
    keep_models: int = 1
    """Number of best trials whose models stay on disk; the chosen one is exported."""
    concurrency: int | None = None
    """Concurrent trials; null: as many as fit on the CPUs (GPUs)."""
    retry_failed: bool = False
    """Repeat trials that an earlier start of this sweep recorded as failed."""

    def __post_init__(self) -> None:
        run_name(self.name)
        positive("sweep", self, "concurrency", "keep_models", "lr_scale")
        if self.label not in LABELS:
            raise UserError(
                f"label: no method {self.label!r}.{close_match(self.label, LABELS)} Known: {', '.join(LABELS)}"
            )
        if self.base.seed in self.select.seeds:
            raise UserError(f"select.seeds: {self.base.seed} is the trials' own seed (base.seed); choose others")
        if self.search.kind == "population" and self.base.training.rounds < self.search.generations:
            raise UserError(
                f"search.trials / search.population = {self.search.generations} generations, but "
                f"base.training.rounds = {self.base.training.rounds}: each generation needs at least one round"
            )

    @property
    def run(self) -> UnlearnConfig:
        """The base with the label's overrides."""
        return apply_overrides(self.base, LABELS[self.label], option=f"{self.label}: ")
