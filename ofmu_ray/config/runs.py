"""One configuration per command."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ofmu_ray.config.data import BUILTIN_FORGET, DataConfig, SourceConfig, TrainDataConfig
from ofmu_ray.config.evaluation import EvaluationConfig, ProbeConfig
from ofmu_ray.config.images import ClassifierConfig
from ofmu_ray.config.method_sections import METHODS, MethodName
from ofmu_ray.config.methods import FinetuneConfig, MethodConfig
from ofmu_ray.config.models import BUILTIN_TARGET, ExportConfig, ModelConfig, ScratchConfig
from ofmu_ray.config.ranges import not_negative, require, run_name, seed
from ofmu_ray.config.training import StopConfig, TrainingConfig

BUILTIN_CLUSTERS: dict[str, int | str] = {
    "forget": 8,
    "retain": 2,
    "holdout": 8,
    "paraphrase_forget": 8,
    "paraphrase_retain": 2,
    "multihop_forget": 6,
    "multihop_retain": 6,
    "crosslingual_forget": 8,
    "crosslingual_retain": 8,
}
"""Rows per person in the built-in files."""
BUILTIN_PROBES = [
    ProbeConfig(
        name=name,
        forget=f"builtin:people/probes_{name}_forget.jsonl",
        retain=f"builtin:people/probes_{name}_retain.jsonl",
    )
    for name in ("paraphrase", "multihop", "crosslingual")
]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str | None = None
    """Tracking URI; null: sqlite:///STORAGE/mlflow.db."""
    experiment: str = "ofmu"
    """Experiment name."""
    tensorboard: str | None = None
    """Folder for the series as TensorBoard's event files, too (the extra tensorboard); null: none."""
    system_metrics: bool = True
    """Log CPU, memory and GPU usage of the driver's machine."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The HTML page of a run."""

    samples: int = 5
    """Generations to show per set."""
    reveal_text: bool = False
    """Show the text of forget rows (personal data); otherwise only their ids."""

    def __post_init__(self) -> None:
        not_negative("report", self, "samples")


def with_sections(kind: type[Any]) -> type[Any]:
    """Add a section of options for each method to a class that is about to become a dataclass."""
    for name, options in METHODS.items():
        kind.__annotations__[name] = options
        setattr(kind, name, field(default_factory=options.default))
    return kind


@dataclass(frozen=True, kw_only=True)
@with_sections
class UnlearnConfig:
    """`ofmu unlearn`: make a model forget. Each method has a section of its name."""

    name: str | None = None
    """Run name; the same name resumes. null: derived from the configuration's hash."""
    storage: str = "runs"
    """Folder or URI (s3://, gs://) for runs, checkpoints and caches. On a cluster, a folder that all nodes share."""
    overwrite: bool = False
    """Delete a run of this name that was started with other options; one with these options resumes."""
    seed: int = 0
    """Seed of the batch order."""
    task: str = "causal_lm"
    """causal_lm, image_classification, or the module of a TASK (ofmu_ray/tasks/protocol.py)"""
    method: MethodName = "ofmu"
    """Unlearning method. Its options are in the section of its name; the other methods' sections are ignored."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to change."""
    data: DataConfig = field(default_factory=DataConfig)
    """Forget and retain rows."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the loop runs."""
    stop: StopConfig = field(default_factory=StopConfig)
    """When to stop early."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The model that comes out."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Metrics at the end."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The HTML page."""

    def __post_init__(self) -> None:
        run_name(self.name)
        seed("seed", self.seed)
        object.__setattr__(self, "evaluation", resolved(self.evaluation, self.data, self.model.path))
        for name in METHODS:
            self.section(name).check(name)
        self.method_options.check_run(self)
        self.export.check(self.model)

    def section(self, method: str) -> MethodConfig:
        """The options of a method."""
        options: MethodConfig = getattr(self, method)
        return options

    @property
    def method_options(self) -> MethodConfig:
        """The section of the chosen method."""
        return self.section(self.method)

    @property
    def unused_sections(self) -> frozenset[str]:
        """Ignored sections: those of the other methods."""
        return frozenset(METHODS) - {self.method}

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The rows that the run reads, by stream."""
        read = self.method_options.streams
        return {name: source for name, source in self.data.sources.items() if name in read}


def resolved(
    evaluation: EvaluationConfig, data: DataConfig, model: str | None, *, everything: bool = False
) -> EvaluationConfig:
    """Resolves `auto`: built-in rows and retrained model only with the built-in data and target.

    `everything`: also the holdout rows and the probes, which the evaluation within a run skips to save time.
    """
    builtin = data.forget.path == BUILTIN_FORGET
    sets: dict[str, Any] = {
        name: f"builtin:people/{name}_perturbed.jsonl" if builtin else None
        for name in ("forget", "retain", "real_authors", "world_facts")
        if getattr(evaluation.sets, name) == "auto"
    }
    clusters, retrained = evaluation.clusters, evaluation.retrained
    if clusters == "auto":
        clusters = BUILTIN_CLUSTERS if builtin and len(sets) == 4 else None
    if evaluation.sets.holdout == "auto":
        sets["holdout"] = "builtin:people/holdout.jsonl" if builtin and everything else None
    if evaluation.sets.probes == "auto":
        sets["probes"] = BUILTIN_PROBES if builtin and everything else []
    if retrained == "auto":
        retrained = "builtin:people/retrained" if builtin and model == BUILTIN_TARGET else None
    replaced = dataclasses.replace(evaluation.sets, **sets)
    return dataclasses.replace(evaluation, sets=replaced, retrained=retrained, clusters=clusters)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`ofmu train`: train a target or a retrained model."""

    name: str | None = None
    """Run name; the same name resumes. null: derived from the configuration's hash."""
    storage: str = "runs"
    """Folder or URI (s3://, gs://) for runs, checkpoints and caches. On a cluster, a folder that all nodes share."""
    overwrite: bool = False
    """Delete a run of this name that was started with other options; one with these options resumes."""
    seed: int = 0
    """Seed of the initial weights and of the batch order."""
    task: str = "causal_lm"
    """Kind of model and rows, as in `ofmu unlearn`."""
    model: ModelConfig | None = None
    """Start from this model; null: from scratch."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """Shape of a model from scratch (if model is null)."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name for a model from scratch; null: learned from the rows."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Shape of an image classifier from scratch (task image_classification, if model is null)."""
    data: TrainDataConfig = field(default_factory=TrainDataConfig)
    """Rows to train on."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Optimiser and schedule."""
    epochs: float = 10.0
    """Passes over the rows; sets the number of rounds (training.rounds is ignored)."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(batch_size=16, checkpoint_every=200))
    """How the loop runs."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The model that comes out."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        run_name(self.name)
        seed("seed", self.seed)
        self.finetune.check("finetune")
        self.export.check(self.model)
        require(0 < self.epochs < math.inf, "epochs", self.epochs, "greater than 0 and finite")
