"""Options of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from ofmu_ray.config.ranges import positive


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
        positive("evaluation", self, "max_rows", "max_new_tokens", "batch_size", "actors", "bootstrap_samples")
