"""Every option of the project, declared once, as frozen dataclasses.

jsonargparse turns them into the YAML schema, the ``--section.option`` overrides and the help text. A value's type
and range are checked when it is built; what depends on files or on the machine is checked in ``pipelines/``
before any worker starts. Nothing here imports torch or Ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ofmu_ray.errors import UserError
from ofmu_ray.storage import without_credentials

BUILTIN_TARGET = "builtin:people/target"
BUILTIN_FORGET = "builtin:people/forget.jsonl"
PresetName = Literal["full", "lite"]
Precision = Literal["fp32", "bf16", "bf16_autocast"]


def _require(condition: bool, option: str, found: object, need: str) -> None:
    if not condition:
        raise UserError(f"{option} = {found!r}: must be {need}")


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            ok = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
            _require(ok, f"{section}.{name}", value, "greater than 0")


def _not_negative(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            ok = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            _require(ok, f"{section}.{name}", value, "0 or more")


# ---------------------------------------------------------------------------------------------------- the method


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser of one loop."""

    name: Literal["sgd", "adamw"] = "adamw"
    """Update rule, elementwise on the rank's shard of the fp32 weights (torch.optim)."""
    lr: float = 1e-5
    """Learning rate (per step)."""
    clip: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    momentum: float = 0.0
    """Momentum of sgd (0 to 1)."""
    beta1: float = 0.9
    """First-moment decay of adamw."""
    beta2: float = 0.999
    """Second-moment decay of adamw."""
    eps: float = 1e-8
    """Denominator floor of adamw."""
    weight_decay: float = 0.0
    """Decoupled weight decay per step, times lr."""

    def check(self, section: str) -> None:
        """Ranges; the owner calls it, because only the owner knows the option's full name."""
        _positive(section, self, "lr", "clip", "eps")
        _not_negative(section, self, "weight_decay")
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{section}.{name}", value, "at least 0 and less than 1")


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

    def __post_init__(self) -> None:
        _not_negative("ofmu", self, "beta", "rho")
        _positive("ofmu", self, "inner_steps", "outer_steps", "rho_growth", "relative_step", "decorrelate_every")
        self.inner.check("ofmu.inner")
        self.outer.check("ofmu.outer")
        if self.relative_step is not None:
            _require(self.relative_step <= 0.1, "ofmu.relative_step", self.relative_step, "at most 0.1")

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

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3, weight_decay=0.01))
    """Optimiser of the fit."""
    warmup_fraction: float = 0.05
    """Fraction of the rounds over which the learning rate rises linearly from 0 (0 to 1)."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up, down to a tenth of lr at the last round."""

    def __post_init__(self) -> None:
        self.optimizer.check("finetune.optimizer")
        _require(0 <= self.warmup_fraction < 1, "finetune.warmup_fraction", self.warmup_fraction, "in [0, 1)")


# ------------------------------------------------------------------------------------------------- model and data


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (peft); merged into the weights on export."""

    rank: int = 8
    """Rank of the update matrices."""
    alpha: float = 16.0
    """Scaling; the update is multiplied by alpha / rank."""
    target_modules: list[str] | None = None
    """Names of the modules to adapt; null: all linear layers but the output head."""

    def __post_init__(self) -> None:
        _positive("model.lora", self, "rank", "alpha")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to change."""

    path: str = BUILTIN_TARGET
    """Model directory (Hugging Face layout, safetensors), hub name, or builtin:people/target."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name; null: the model's own."""
    precision: Precision = "fp32"
    """fp32; bf16 (bf16 weights, fp32 master copy); bf16_autocast (fp32 weights, bf16 passes, fp32 differences)."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation; exact curvature needs eager."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (less memory, about a third more time)."""
    lora: LoraConfig | None = None
    """Train low-rank adapters only; null: train the weights."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions; parameters whose name matches one stay fixed."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """A small Llama from scratch (`ofmu train`)."""

    hidden_size: int = 128
    """Width."""
    intermediate_size: int = 344
    """Width of the feed-forward layers."""
    layers: int = 4
    """Number of layers."""
    heads: int = 4
    """Number of attention heads."""
    kv_heads: int = 4
    """Number of key/value heads."""
    vocab_size: int = 4096
    """Size of the byte-pair vocabulary that is learned from the training rows (model.tokenizer: null)."""
    max_length: int = 512
    """Longest sequence (tokens)."""
    tie_embeddings: bool = True
    """Share the input and output embeddings."""

    def __post_init__(self) -> None:
        names = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "vocab_size", "max_length")
        _positive("scratch", self, *names)
        _require(self.hidden_size % self.heads == 0, "scratch.heads", self.heads, "a divisor of scratch.hidden_size")
        _require(self.heads % self.kv_heads == 0, "scratch.kv_heads", self.kv_heads, "a divisor of scratch.heads")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where rows come from."""

    path: str | list[str] | None = None
    """File, folder, glob or URI (local, s3://, gs://) of JSON Lines or Parquet, or a list of those;
    builtin:people/NAME; or a hub name."""
    format: Literal["auto", "json", "parquet", "hub"] = "auto"
    """auto: by suffix (.json and .jsonl are JSON Lines)."""
    hub_config: str | None = None
    """Configuration of a hub data set."""
    hub_split: str = "train"
    """Split of a hub data set."""
    limit: int | None = None
    """Use the first n rows only; null: all."""

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return list(self.path) if isinstance(self.path, list) else [self.path] if self.path else []

    @property
    def shown(self) -> str:
        """`path` for messages and reports: without user, password and query."""
        return ", ".join(without_credentials(path) for path in self.paths)

    def check(self, section: str) -> None:
        """Ranges; the owner calls it, because only the owner knows the option's full name."""
        _positive(section, self, "limit")
        given = bool(self.paths) and all(self.paths)
        _require(given, f"{section}.path", self.path, "a file, folder, glob, URI or hub name")


@dataclass(frozen=True, kw_only=True)
class FormatConfig:
    """How a row becomes tokens."""

    question: str = "question"
    """Column of the prompt."""
    answer: str = "answer"
    """Column of the answer (the only tokens with a loss)."""
    template: Literal["auto", "chat", "qa"] = "auto"
    """The tokenizer's chat template, or prompt_template; auto: chat if the tokenizer has one."""
    prompt_template: str = "Question: {question}\nAnswer:"
    """Prompt of the qa template; the answer follows after one space."""
    system_prompt: str | None = None
    """System message of the chat template."""
    max_length: int = 512
    """Longest row (tokens); longer rows are cut on the right and counted in the report."""

    def __post_init__(self) -> None:
        _positive("data.format", self, "max_length")
        found = self.prompt_template
        _require("{question}" in found, "data.format.prompt_template", found, "a text that contains {question}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Forget and retain rows."""

    root: str | None = None
    """Folder or URI that relative data paths (here and in evaluation) start from; null: the working directory."""
    forget: SourceConfig = field(default_factory=lambda: SourceConfig(path=BUILTIN_FORGET))
    """Rows to forget; every one is used, cycled in a new order each time."""
    retain: SourceConfig = field(default_factory=lambda: SourceConfig(path="builtin:people/retain.jsonl"))
    """Rows to keep; streamed."""
    format: FormatConfig = field(default_factory=FormatConfig)
    """How a row becomes tokens."""
    overlap: Literal["error", "drop", "allow"] = "error"
    """Rows that stand in forget and in retain (exactly, or after normalising case and spaces): drop is from retain."""
    duplicates: Literal["error", "drop", "allow"] = "allow"
    """Rows that stand twice in one source; allow keeps and reports them."""

    def __post_init__(self) -> None:
        self.forget.check("data.forget")
        self.retain.check("data.retain")


@dataclass(frozen=True, kw_only=True)
class TrainDataConfig:
    """Rows to fit."""

    root: str | None = None
    """Folder or URI that relative data paths start from; null: the working directory."""
    train: SourceConfig = field(default_factory=lambda: SourceConfig(path="builtin:people/full.jsonl"))
    """Rows to fit."""
    format: FormatConfig = field(default_factory=FormatConfig)
    """How a row becomes tokens."""
    duplicates: Literal["error", "drop", "allow"] = "allow"
    """Rows that stand twice; allow keeps and reports them."""

    def __post_init__(self) -> None:
        self.train.check("data.train")


# ------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the loop runs on Ray Train."""

    engine: Literal["torch", "deepspeed"] = "deepspeed"
    """deepspeed (ZeRO, any number of workers) or torch (one worker; offers exact curvature)."""
    workers: int = 1
    """Ray Train workers (processes)."""
    cpus_per_worker: float = 1.0
    """CPU cores of one worker (also its number of compute threads)."""
    gpus_per_worker: float = 0.0
    """GPUs of one worker; 0: CPU with gloo, otherwise CUDA with NCCL."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what is sharded over the workers."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: keep the optimisers' moments in host memory between steps."""
    rounds: int = 20
    """Rounds of the method (for OFMU: K outer iterations)."""
    batch_size: int = 8
    """Rows of one batch, over all workers; the gradient accumulation follows from it."""
    micro_batch_size: int | None = None
    """Rows of one forward pass on one worker; null: the worker's whole share of a batch."""
    checkpoint_every: int = 10
    """Rounds between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    max_failures: int = 3
    """Worker failures after which a run gives up."""

    def __post_init__(self) -> None:
        names = ("workers", "cpus_per_worker", "rounds", "batch_size", "micro_batch_size", "checkpoint_every")
        _positive("training", self, *names, "keep_checkpoints")
        _not_negative("training", self, "gpus_per_worker", "max_failures")
        if self.batch_size % self.workers:
            raise UserError(
                f"training.batch_size = {self.batch_size} does not divide over training.workers = {self.workers}: "
                "make the batch a multiple of the workers"
            )
        share = self.batch_size // self.workers
        if self.micro_batch_size and share % self.micro_batch_size:
            raise UserError(
                f"training.micro_batch_size = {self.micro_batch_size} does not divide a worker's share of the batch "
                f"({self.batch_size} / {self.workers} = {share} rows): choose a divisor of {share}"
            )
        if self.engine == "torch" and self.workers > 1:
            raise UserError(
                f"training.engine = torch runs in one process, but training.workers = {self.workers}: "
                "use --training.engine deepspeed or --training.workers 1"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per batch and worker."""
        return self.batch_size // self.workers // (self.micro_batch_size or self.batch_size // self.workers)


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When to stop before the last round; the last good weights are kept."""

    utility_floor: float | None = None
    """Stop when the mean answer probability on a fixed sample of retain rows falls below this fraction of its start."""
    check_every: int = 5
    """Rounds between checks of the floor."""
    sample: int = 64
    """Retain rows in the check."""

    def __post_init__(self) -> None:
        _positive("stop", self, "check_every", "sample")
        if self.utility_floor is not None:
            _require(0 < self.utility_floor <= 1, "stop.utility_floor", self.utility_floor, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class EvaluationSetsConfig:
    """Evaluation rows, TOFU's layout: question, answer and optionally paraphrased_answer, perturbed_answer (a list)."""

    forget: str | None = "auto"
    """Rows of the forget set; null: the rows of data.forget. auto: the built-in rows with built-in data, else null."""
    retain: str | None = "auto"
    """Rows of the retain set; null: the first max_rows rows of data.retain. auto: as for forget."""
    real_authors: str | None = "auto"
    """Rows about real people near the forget set's subject; null: none (no model utility then). auto: as for forget."""
    world_facts: str | None = "auto"
    """Rows of general knowledge; null: none (no model utility then). auto: as for forget."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Metrics at the end of a run (definitions: docs/metrics.md)."""

    enabled: bool = True
    """Evaluate before and after."""
    sets: EvaluationSetsConfig = field(default_factory=EvaluationSetsConfig)
    """Evaluation rows."""
    retrained: str | None = "auto"
    """Model trained without the forget rows; null: no forget quality. auto: the built-in with its target, else null."""
    max_rows: int | None = 400
    """First n rows of each set; null: all."""
    max_new_tokens: int = 200
    """Longest generation (tokens)."""
    batch_size: int = 64
    """Rows of one batch."""
    actors: int | None = None
    """Ray actors; null: one per free CPU (or GPU), at most 8."""
    bootstrap_samples: int = 1000
    """Resamples of rows for the 95 % intervals."""

    def __post_init__(self) -> None:
        _positive("evaluation", self, "max_rows", "max_new_tokens", "batch_size", "actors", "bootstrap_samples")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str | None = None
    """Tracking URI; null: sqlite:///STORAGE/mlflow.db."""
    experiment: str = "ofmu"
    """Experiment name."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use of the driver's machine."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The HTML page of a run."""

    samples: int = 5
    """Generations shown per set."""
    reveal_text: bool = False
    """Show the text of forget rows (personal data); otherwise they appear by id."""

    def __post_init__(self) -> None:
        _not_negative("report", self, "samples")


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig:
    """`ofmu unlearn`: make a model forget."""

    name: str | None = None
    """Run name; the same name resumes. null: derived from the configuration's hash."""
    storage: str = "runs"
    """Folder of runs, checkpoints and caches; on a cluster, one that all nodes share."""
    seed: int = 0
    """Seed of the batch order."""
    method: Literal["ofmu"] = "ofmu"
    """Unlearning method."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to change."""
    data: DataConfig = field(default_factory=DataConfig)
    """Forget and retain rows."""
    ofmu: OFMUConfig = field(default_factory=OFMUConfig)
    """Options of method ofmu."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the loop runs."""
    stop: StopConfig = field(default_factory=StopConfig)
    """When to stop early."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Metrics at the end."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The HTML page."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluation", self._resolved_evaluation())
        exact = self.ofmu.curvature == "exact"
        if exact and self.training.engine != "torch":
            raise UserError(
                "ofmu.curvature = exact needs double backward, which DeepSpeed does not offer on sharded models: "
                "use --training.engine torch (one worker) or --ofmu.curvature finite_difference"
            )
        if exact and self.model.attention != "eager":
            raise UserError(
                "ofmu.curvature = exact: fused attention has no double backward; add --model.attention eager"
            )
        if exact and self.model.gradient_checkpointing:
            raise UserError(
                "ofmu.curvature = exact cannot run with gradient checkpointing: "
                "set --model.gradient_checkpointing false or --ofmu.curvature finite_difference"
            )

    def _resolved_evaluation(self) -> EvaluationConfig:
        """`auto` replaced: the built-in rows and reference go with the built-in data and target only."""
        builtin_rows = self.data.forget.path == BUILTIN_FORGET
        sets = {
            name: (f"builtin:people/{name}_perturbed.jsonl" if builtin_rows else None) if path == "auto" else path
            for name, path in to_dict(self.evaluation.sets).items()
        }
        retrained = self.evaluation.retrained
        if retrained == "auto":
            both = builtin_rows and self.model.path == BUILTIN_TARGET
            retrained = "builtin:people/retrained" if both else None
        return dataclasses.replace(self.evaluation, sets=EvaluationSetsConfig(**sets), retrained=retrained)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`ofmu train`: fit a target or a retrained model."""

    name: str | None = None
    """Run name; the same name resumes. null: derived from the configuration's hash."""
    storage: str = "runs"
    """Folder of runs, checkpoints and caches; on a cluster, one that all nodes share."""
    seed: int = 0
    """Seed of the initial weights and of the batch order."""
    model: ModelConfig | None = None
    """Start from this model; null: from scratch."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """Shape of a model from scratch (when model is null)."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name of a model from scratch; null: learned from the rows."""
    data: TrainDataConfig = field(default_factory=TrainDataConfig)
    """Rows to fit."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Optimiser and schedule."""
    epochs: float = 10.0
    """Passes over the rows; sets the number of rounds (training.rounds is ignored)."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(batch_size=16, checkpoint_every=200))
    """How the loop runs."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "epochs", self.epochs, "greater than 0")


# ------------------------------------------------------------------------------------------------ values and hashes


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts (JSON and YAML can hold it)."""
    return dataclasses.asdict(config)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}: the names that the command line and MLflow use."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def config_hash(config: Any, *extra: str, ignore: Iterable[str] = ("name", "storage", "tracking", "report")) -> str:
    """Hex digest (16 digits) of what determines a run: the config without where it is stored, plus `extra`."""
    content = {key: value for key, value in to_dict(config).items() if key not in set(ignore)}
    text = json.dumps([content, *extra], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def close_match(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a misspelt option, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""
