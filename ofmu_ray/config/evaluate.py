"""Options of `ofmu evaluate`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ofmu_ray.config.data import DataConfig
from ofmu_ray.config.evaluation import EvaluationConfig
from ofmu_ray.config.models import BUILTIN_TARGET
from ofmu_ray.config.ranges import positive, require, run_name, seed
from ofmu_ray.config.robustness import PrefixOptions, QuantiseOptions, RelearnOptions
from ofmu_ray.config.runs import ReportConfig, TrackingConfig, resolved
from ofmu_ray.errors import UserError

RETRAINED = "retrained"


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """Multiple-choice questions in the format of WMDP and MMLU: question, choices (a list), answer (an index)."""

    name: str
    """Name in the report."""
    path: str
    """File, folder, glob or URI of JSON or Parquet, or a hub name (cais/wmdp)."""
    format: Literal["auto", "json", "parquet", "hub"] = "auto"
    """auto: by suffix. A hub name is recognised only without data.root; with data.root, set `hub`."""
    hub_config: str | None = None
    """Configuration of a hub data set (wmdp-bio)."""
    hub_split: str = "test"
    """Split of a hub data set."""
    scoring: Literal["letters", "cloze"] = "letters"
    """letters: likelihood of A, B, ... after the listed choices; cloze: mean log-likelihood of each choice's text."""
    limit: int | None = None
    """Use only the first n rows; null: all."""

    def __post_init__(self) -> None:
        positive("checks.choice", self, "limit")


@dataclass(frozen=True, kw_only=True)
class ChecksConfig:
    """Further measurements; each costs extra passes."""

    relearn: RelearnOptions | None = None
    """Relearning attack; null: none; {}: with defaults."""
    quantise: QuantiseOptions | None = None
    """Rounded weights; null: none."""
    prefix: PrefixOptions | None = None
    """Other ways to ask; null: none."""
    choice: list[ChoiceConfig] = field(default_factory=list)
    """Multiple-choice questions."""
    alignment: bool = False
    """Embedding alignment with the retrained model, layer by layer."""
    gradient_norm: bool = False
    """GradNorm attack among the membership metrics (needs evaluation.sets.holdout): one backward pass per row."""
    lm_eval: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness (extra lm-eval)."""

    def __post_init__(self) -> None:
        names = [choice.name for choice in self.choice]
        for name in names:
            plain = re.fullmatch(r"[\w.-]+", name, re.ASCII) and names.count(name) == 1
            require(bool(plain), "checks.choice.name", name, "a word of letters, digits and _ . -, once")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`ofmu evaluate`: any number of models side by side, on the same rows, with the same code as the end of a run."""

    name: str | None = None
    """Name of the evaluation; null: derived from the configuration's hash."""
    storage: str = "runs"
    """Folder for results and caches."""
    seed: int = 0
    """Seed of the bootstrap resamples."""
    task: str = "causal_lm"
    """Kind of models and rows, as in `ofmu unlearn`; checks are for language models."""
    models: dict[str, str] = field(default_factory=lambda: {"target": BUILTIN_TARGET})
    """Label -> model directory (Hugging Face layout, safetensors) or hub name. The label `retrained` is reserved."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name for all models; null: each model's own (if it has none: the first other's)."""
    trust_remote_code: bool = False
    """Run code from the model repositories."""
    data: DataConfig = field(default_factory=DataConfig)
    """Source of rows that evaluation.sets does not name, and how a row becomes tokens."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Sets of rows, the retrained model, generation, intervals."""
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    """Further measurements."""
    peer_names: bool = False
    """Also write peer_names.json: the metrics under OpenUnlearning's names and by its conventions."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The HTML page."""

    def __post_init__(self) -> None:
        run_name(self.name)
        seed("seed", self.seed)
        require(bool(self.models) and all(self.models.values()), "models", self.models, "a mapping of label to folder")
        for label in self.models:
            plain = re.fullmatch(r"[\w.-]+", label, re.ASCII)
            require(plain is not None, "models", label, "labelled with letters, digits and _ . -")
        if not self.evaluation.enabled:
            raise UserError("evaluation.enabled = false: this command only evaluates; drop the option")
        if RETRAINED in self.models:
            raise UserError(f"models.{RETRAINED}: give the retrained model as evaluation.retrained")
        first = next(iter(self.models.values()))
        object.__setattr__(self, "evaluation", resolved(self.evaluation, self.data, first, everything=True))
        if self.checks.alignment and self.evaluation.retrained is None:
            raise UserError("checks.alignment needs a retrained model: set evaluation.retrained")
        if self.checks.gradient_norm and self.evaluation.sets.holdout is None:
            raise UserError("checks.gradient_norm needs rows that no model has seen: set evaluation.sets.holdout")

    @property
    def compared(self) -> dict[str, str]:
        """Label -> folder or hub name of all models, with the retrained one last."""
        reference = {RETRAINED: self.evaluation.retrained} if self.evaluation.retrained else {}
        return self.models | reference

    def option(self, label: str) -> str:
        """The option that names a model of `compared`."""
        return "evaluation.retrained" if label == RETRAINED else f"models.{label}"
