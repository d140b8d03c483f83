"""Options of gates and recipes: what an unlearned model must show before it is promoted, and what is tried for it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from ofmu_ray.config.overrides import nested
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.config.robustness import RelearnOptions
from ofmu_ray.config.values import flatten
from ofmu_ray.errors import UserError

GATES, RECIPES = "requests.promotion.gates", "requests.promotion.recipes"
MOST_COMBINATIONS = 16
"""Of a recipe's grid: each is a run of its own."""
Against = Literal["holdout", "retrained", "champion"]


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """A bound on a metric. It passes if the whole 95 % interval keeps to the bound."""

    metric: str
    """As in metrics.json of `ofmu evaluate` (forget_probability, mia_min_k_auc), or relearn/forget/step_5."""
    rows: Literal["requested", "earlier"] = "requested"
    """requested: the rows of these requests stand for `forget`; earlier: those of every earlier request, together and
    each request with two rows or more on its own (persistence)."""
    against: Against | None = None
    """What the metric is compared with. holdout: the same model on never-seen rows (relearn: the same attack on them),
    by the difference; retrained: evaluation.retrained on the same rows, by the difference; champion: the model
    before on the same rows, by the ratio; null: nothing, the metric itself counts."""
    at_least: float | None = None
    """Lower bound."""
    at_most: float | None = None
    """Upper bound."""
    if_absent: Literal["fail", "skip"] = "fail"
    """What happens if the rows do not give the metric (truth ratios need paraphrased and wrong answers)."""

    @property
    def name(self) -> str:
        """Name in reports and certificates."""
        return (f"{self.metric} of earlier requests" if self.rows == "earlier" else self.metric) + (
            f" against {self.against}" if self.against else ""
        )

    def check(self) -> None:
        """Checks ranges."""
        if self.at_least is None and self.at_most is None:
            raise UserError(f"{GATES}: {self.name} has no bound: give at_least, at_most or both")
        whole = self.at_least is None or self.at_most is None or self.at_least <= self.at_most
        require(whole, f"{GATES}: {self.name}: at_least", self.at_least, f"at most {self.at_most}")
        if self.rows == "earlier" and (self.relearns or self.against == "retrained"):
            raise UserError(f"{GATES}: {self.name}: not measured on earlier requests; use rows: requested")
        if self.relearns and self.against == "champion":
            raise UserError(f"{GATES}: {self.name}: compare relearning with holdout, retrained or a bound alone")

    @property
    def relearns(self) -> bool:
        """Whether it needs the relearning attack."""
        return self.metric.startswith("relearn/")


def _gates() -> list[GateConfig]:
    """What forgetting, sound generations and utility mean by default; docs/requests.md has the reasons."""

    def holdout(metric: str, **bounds: Any) -> GateConfig:
        return GateConfig(metric=metric, against="holdout", **bounds)

    return [
        holdout("forget_probability", at_most=0.2),
        holdout("forget_truth_ratio", at_least=-0.4, if_absent="skip"),
        holdout("forget_extraction_strength", at_most=0.25),
        GateConfig(metric="mia_min_k_auc", at_least=0.2, at_most=0.8),
        holdout("forget_repetition", at_most=0.1),
        holdout("forget_empty", at_most=0.1),
        holdout("forget_ngram_variety", at_least=-0.1),
        GateConfig(metric="retain_probability", against="champion", at_least=0.9),
        GateConfig(metric="model_utility", against="champion", at_least=0.9, if_absent="skip"),
        holdout("forget_probability", rows="earlier", at_most=0.2),
        holdout("forget_extraction_strength", rows="earlier", at_most=0.25),
        holdout("relearn/forget/step_5", at_most=0.25),
    ]


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """One way to unlearn: options of `ofmu unlearn` over the configuration's own."""

    name: str
    """A word for reports and the run's name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Option -> value, dotted or nested, such as {training.rounds: 60, ofmu.inner.lr: 1.0e-3}."""
    rounds_factor: float | None = None
    """Factor on the configuration's training.rounds; null: as configured, or as in options."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """A small sweep: option -> values, such as {ofmu.inner.lr: [1.0e-3, 2.0e-3]}. Each combination is a recipe of its
    own, NAME-1, NAME-2, ...; the last option changes first."""

    def __post_init__(self) -> None:
        plain = re.fullmatch(r"[\w-]+", self.name, re.ASCII) is not None
        require(plain, f"{RECIPES}.name", self.name, "a word of letters, digits and _ -")
        where, count = f"{RECIPES}: {self.name}", math.prod(map(len, self.grid.values()))
        for option in (*self.options, *self.grid):
            if option.partition(".")[0] in ("name", "storage", "overwrite", "model", "data", "tracking", "task"):
                raise UserError(f"{where}: .{option}: set by the pipeline; drop it")
        for option, values in self.grid.items():
            require(bool(values), f"{where}: grid.{option}", values, "a list of at least one value")
        require(count <= MOST_COMBINATIONS, f"{where}: combinations of grid", count, f"at most {MOST_COMBINATIONS}")
        positive(where, self, "rounds_factor")
        if self.rounds_factor is not None and "training.rounds" in flatten(nested({**self.options, **self.grid})):
            raise UserError(f"{where}: rounds_factor and training.rounds: give one of them")

    def variants(self) -> list[RecipeConfig]:
        """A recipe without a grid for each combination; the recipe itself if it has none."""
        if not self.grid:
            return [self]
        combinations = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        return [
            replace(self, name=f"{self.name}-{number}", options={**self.options, **chosen}, grid={})
            for number, chosen in enumerate(combinations, start=1)
        ]


def _recipes() -> list[RecipeConfig]:
    patient = {"stop": {"forgotten": None}}
    return [
        RecipeConfig(name="base"),
        RecipeConfig(name="longer", rounds_factor=3, options=patient),
        RecipeConfig(name="longest", rounds_factor=6, options=patient),
    ]


@dataclass(frozen=True, kw_only=True)
class PromotionConfig:
    """From an unlearned model to the next champion."""

    model_name: str = "ofmu"
    """Name in MLflow's model registry; the alias `champion` is the model in use, `previous` the one before."""
    gates: list[GateConfig] = field(default_factory=_gates)
    """All of them must pass."""
    relearn: RelearnOptions = field(default_factory=lambda: RelearnOptions(rows=20, steps=(1, 2, 5), lr=1e-5))
    """The relearning attack of the gates relearn/...; with fewer requested rows it trains on half of them."""
    recipes: list[RecipeConfig] = field(default_factory=_recipes)
    """Tried in this order until all gates pass; after the last one a person decides (state needs_review)."""
    keys: str | None = None
    """Folder of the signing keys; null: STORAGE/requests/keys."""

    def __post_init__(self) -> None:
        plain = re.fullmatch(r"[\w.-]+", self.model_name, re.ASCII) is not None
        require(plain, "requests.promotion.model_name", self.model_name, "a word of letters, digits and _ . -")
        require(bool(self.recipes), RECIPES, "[]", "at least one recipe")
        require(bool(self.gates), GATES, "[]", "at least one gate")
        for option, entries in ((RECIPES, self.ladder), (GATES, self.gates)):
            names: Sequence[str] = [entry.name for entry in entries]
            for name in names:
                require(names.count(name) == 1, option, name, "there once")
        for gate in self.gates:
            gate.check()

    @property
    def ladder(self) -> list[RecipeConfig]:
        """The recipes in the order in which they are tried, grids as one recipe for each combination."""
        return [variant for recipe in self.recipes for variant in recipe.variants()]
