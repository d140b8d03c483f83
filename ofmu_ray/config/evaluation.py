"""Options of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ofmu_ray.config.ranges import not_negative, positive, require
from ofmu_ray.config.values import close_match
from ofmu_ray.errors import UserError

CLUSTERED = ("forget", "retain", "real_authors", "world_facts", "holdout")
"""Sets of questions, besides those of probes."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Other questions about the facts of the forget (and retain) rows."""

    name: str
    """Name of the probe; its sets are NAME_forget and NAME_retain."""
    forget: str
    """Rows about what should be forgotten."""
    retain: str | None = None
    """The same kind of rows about what should be retained; null: none."""
    question: str = "question"
    """Column of the question (TOFU's perturbed files have paraphrased_question)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSetsConfig:
    """Evaluation rows in TOFU's layout: question, answer, optional paraphrased_answer and perturbed_answer (a list)."""

    forget: str | None = "auto"
    """Rows of the forget set; null: the rows of data.forget. auto: the built-in rows with built-in data, else null."""
    retain: str | None = "auto"
    """Rows of the retain set; null: the first max_rows rows of data.retain. auto: as for forget."""
    real_authors: str | None = "auto"
    """Rows about real people near the forget set's subject; null: none (no model utility). auto: as for forget."""
    world_facts: str | None = "auto"
    """Rows of general knowledge; null: none (no model utility). auto: as for forget."""
    holdout: str | None = "auto"
    """Rows like the forget rows that no model has seen, for membership inference; null: no membership metrics. auto:
    the built-in rows for `ofmu evaluate` with built-in data, else null."""
    forget_choice: str | None = None
    """Multiple-choice questions about what should be forgotten (WMDP's cais/wmdp:wmdp-bio:test); null: none."""
    retain_choice: str | None = None
    """Multiple-choice questions of general knowledge (MMLU's cais/mmlu:all:test); null: none. Of more than max_rows,
    evenly spread ones count."""
    choice_scoring: Literal["letters", "cloze"] = "letters"
    """letters: likelihood of A, B, ... after the listed choices; cloze: mean log-likelihood of each choice's text."""
    forget_verbatim: str | None = None
    """MUSE's texts to continue (verbmem: prompt, gt); null: none."""
    forget_knowledge: str | None = None
    """MUSE's questions about what should be forgotten (knowmem: question, answer); null: none."""
    forget_examples: str | None = None
    """Questions with answers that precede each of forget_knowledge; null: none."""
    retain_knowledge: str | None = None
    """MUSE's questions about what should be kept; null: none."""
    retain_examples: str | None = None
    """Questions with answers that precede each of retain_knowledge; null: none."""
    forget_documents: str | None = None
    """MUSE's documents that should be forgotten, for its PrivLeak (privleak); null: none."""
    holdout_documents: str | None = None
    """The same of documents that no model has seen; null: none."""
    probes: list[ProbeConfig] | Literal["auto"] = "auto"
    """Hard probes of the same knowledge: paraphrased, multi-hop or cross-lingual questions. auto: as for holdout."""

    def __post_init__(self) -> None:
        names = [probe.name for probe in self.probes] if isinstance(self.probes, list) else []
        for name in names:
            plain = name.isidentifier() and names.count(name) == 1
            require(plain, "evaluation.sets.probes.name", name, "a word of letters, digits and _, once")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Metrics at the end of a run (definitions: docs/metrics.md)."""

    enabled: bool = True
    """Evaluate before and after the run."""
    sets: EvaluationSetsConfig = field(default_factory=EvaluationSetsConfig)
    """Evaluation rows."""
    retrained: str | None = "auto"
    """Model trained without the forget rows; null: no forget quality. auto: the built-in one for the built-in target,
    else null."""
    clusters: dict[str, int | str] | Literal["auto"] | None = "auto"
    """Rows that intervals resample together (one person's rows): set -> n for n consecutive rows (TOFU: {forget: 20,
    retain: 20}) or a column that names the group; null: single rows. auto: those of the built-in rows."""
    max_rows: int | None = 400
    """First n rows of each set (images: n evenly spread ones); null: all."""
    max_new_tokens: int = 200
    """Longest generation (tokens); 0: none, so no ROUGE, model utility or degeneration."""
    batch_size: int = 64
    """Rows per batch."""
    actors: int | None = None
    """Ray actors; null: one per free CPU (or GPU), at most 8."""
    engine: Literal["auto", "live", "process"] = "auto"
    """Who evaluates a run's own models. live: its workers, with the model that they hold, sharded or not, without a
    second copy; process: processes that load the model whole. auto: on several workers, live at ZeRO-3 and for the
    stages of a sweep, else process."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights of all models that are compared. auto: fp32 on CPUs; on GPUs the widest that one of them is
    stored in."""
    device_map: Literal["auto"] | None = None
    """auto: a process takes all GPUs of a node and lays one model over them (accelerate); null: a GPU has a model."""
    bootstrap_samples: int = 1000
    """Resamples of rows for the 95 % intervals."""

    def __post_init__(self) -> None:
        for name, rows in (self.clusters or {}).items() if isinstance(self.clusters, dict) else ():
            require(
                rows != "" and (isinstance(rows, str) or rows > 0), f"evaluation.clusters.{name}", rows, "1 or more"
            )
            if name not in CLUSTERED and not name.endswith(("_forget", "_retain")):
                hint = close_match(name, CLUSTERED)
                raise UserError(
                    f"evaluation.clusters: no set {name!r}.{hint} Sets: {', '.join(CLUSTERED)}, PROBE_forget"
                )
        positive("evaluation", self, "max_rows", "batch_size", "actors", "bootstrap_samples")
        not_negative("evaluation", self, "max_new_tokens")
