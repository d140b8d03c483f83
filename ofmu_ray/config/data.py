"""Options of data sources and of how rows become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from ofmu_ray.config.ranges import positive, require
from ofmu_ray.config.values import DATE
from ofmu_ray.storage import without_credentials

BUILTIN_FORGET = "builtin:people/forget.jsonl"
BUILTIN_HOLDOUT = "builtin:people/holdout.jsonl"


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
    """Use only the first n rows; null: all."""

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return list(self.path) if isinstance(self.path, list) else [self.path] if self.path else []

    @property
    def shown(self) -> str:
        """`path` for messages and reports: without user, password and query."""
        return ", ".join(without_credentials(path) for path in self.paths)

    def check(self, section: str) -> None:
        """Checks ranges. The owner calls it, because only the owner knows the option's full name."""
        positive(section, self, "limit")
        given = bool(self.paths) and all(self.paths)
        require(given, f"{section}.path", self.path, "a file, folder, glob, URI or hub name")


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
    date: str = DATE
    """Date (YYYY-MM-DD) for chat templates that write today's into the prompt, which would change a run overnight."""
    max_length: int = 512
    """Longest row (tokens); longer rows are truncated on the right and counted in the report."""

    def __post_init__(self) -> None:
        positive("data.format", self, "max_length")
        try:
            datetime.strptime(self.date, "%Y-%m-%d")
        except ValueError:
            require(False, "data.format.date", self.date, f"a date such as {FormatConfig.date}")
        prompt = self.prompt_template
        require("{question}" in prompt, "data.format.prompt_template", prompt, "a text that contains {question}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Forget and retain rows."""

    root: str | None = None
    """Folder or URI that relative data paths (also of evaluation) start from; null: the working directory."""
    forget: SourceConfig = field(default_factory=lambda: SourceConfig(path=BUILTIN_FORGET))
    """Rows to forget; all are used, in a new order in each epoch."""
    retain: SourceConfig = field(default_factory=lambda: SourceConfig(path="builtin:people/retain.jsonl"))
    """Rows to keep; streamed."""
    holdout: SourceConfig | None = None
    """Rows like the forget rows that the model has never seen: they set how far to forget (ofmu.forget_level). null:
    none, except that the built-in forget rows have built-in ones."""
    format: FormatConfig = field(default_factory=FormatConfig)
    """How a row becomes tokens."""
    overlap: Literal["error", "drop", "allow"] = "error"
    """Rows in both forget and retain (exact, or after normalising case and spaces). drop: from retain."""
    duplicates: Literal["error", "drop", "allow"] = "allow"
    """Duplicate rows within one source; allow keeps and reports them."""

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            source.check(f"data.{name}")

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The configured sources by stream name."""
        builtin = SourceConfig(path=BUILTIN_HOLDOUT) if self.forget.path == BUILTIN_FORGET else None
        named = {"forget": self.forget, "retain": self.retain, "holdout": self.holdout or builtin}
        return {name: source for name, source in named.items() if source is not None}


@dataclass(frozen=True, kw_only=True)
class TrainDataConfig:
    """Rows to train on."""

    root: str | None = None
    """Folder or URI that relative data paths start from; null: the working directory."""
    train: SourceConfig = field(default_factory=lambda: SourceConfig(path="builtin:people/full.jsonl"))
    """Rows to train on."""
    format: FormatConfig = field(default_factory=FormatConfig)
    """How a row becomes tokens."""
    duplicates: Literal["error", "drop", "allow"] = "allow"
    """Duplicate rows; allow keeps and reports them."""

    def __post_init__(self) -> None:
        self.train.check("data.train")
