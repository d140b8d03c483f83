"""Options of data sources and of how rows become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from ofmu_ray.config.images import ImagesConfig, SplitConfig
from ofmu_ray.config.ranges import not_negative, positive, require
from ofmu_ray.config.values import DATE
from ofmu_ray.errors import UserError
from ofmu_ray.storage import without_credentials

BUILTIN_FORGET = "builtin:people/forget.jsonl"
BUILTIN_HOLDOUT = "builtin:people/holdout.jsonl"

Kind = Literal["qa", "text", "messages"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where rows come from."""

    path: str | list[str] | None = None
    """File, folder, glob, URI or hub name of the rows, or a list of files. Files: JSON (Lines or an array), Parquet,
    CSV, TSV or plain text, local, s3:// or gs://. Also builtin:people/NAME; a folder of save_to_disk; on the hub
    owner/name, with configuration and split owner/name:configuration:split. Images: also builtin:digits/train or test,
    or a folder with one per class."""
    format: Literal["auto", "json", "parquet", "csv", "tsv", "text", "hub", "images"] = "auto"
    """auto: by suffix (.json is JSON Lines or an array; also .jsonl.gz and the like). images: a folder with a folder of
    images for each class."""
    kind: Kind | None = None
    """What the rows are, if not data.format.kind."""
    hub_config: str | None = None
    """Configuration of a hub data set."""
    hub_split: str = "train"
    """Split of a hub data set, or of a folder of save_to_disk."""
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
class PartConfig(SourceConfig):
    """One of the two parts that `data.split` makes of a source."""

    split: SplitConfig
    label: str
    """Column of the class."""
    forgotten: bool
    """The rows to forget, or the others."""

    @classmethod
    def of(cls, source: SourceConfig, split: SplitConfig, label: str, *, forgotten: bool) -> PartConfig:
        """A part of `source`."""
        return cls(**vars(source), split=split, label=label, forgotten=forgotten)


@dataclass(frozen=True, kw_only=True)
class FormatConfig:
    """How a row becomes tokens."""

    kind: Kind = "qa"
    """What rows are. qa: a question and an answer; text: documents, cut into windows, with a loss on all tokens;
    messages: chats, with a loss on the assistant's turns. A source may differ (data.forget.kind)."""
    question: str = "question"
    """Column of the prompt."""
    answer: str = "answer"
    """Column of the answer (the only tokens with a loss)."""
    text: str = "text"
    """Column of the document (kind text); a plain text file is one document."""
    messages: str = "messages"
    """Column of the chat (kind messages): [{role, content}, ...]. Without it, `conversations` (ShareGPT) or `prompt`
    and `completion` (TRL)."""
    min_characters: int = 0
    """Skip documents with fewer characters (50 for wikitext in RMU's release, which has empty lines)."""
    stride: int | None = None
    """New tokens of each further window of a document; the tokens before them are context without a loss. null: no
    context, windows follow each other."""
    packed: bool = False
    """Documents share windows, an EOS between them; otherwise each starts its own."""
    template: Literal["auto", "chat", "qa"] = "auto"
    """The tokenizer's chat template, or prompt_template; auto: chat if the tokenizer has one."""
    prompt_template: str = "Question: {question}\nAnswer:"
    """Prompt of the qa template; the answer follows after one space."""
    system_prompt: str | None = None
    """System message of the chat template."""
    date: str = DATE
    """Date (YYYY-MM-DD) for chat templates that write today's into the prompt, which would change a run overnight."""
    max_length: int = 512
    """Longest row (tokens). Documents are cut into windows of this length; questions with answers, and chats, are
    truncated on the right as far as data.truncate allows, and counted in the report."""

    def __post_init__(self) -> None:
        positive("data.format", self, "max_length", "stride")
        not_negative("data.format", self, "min_characters")
        short = self.stride is None or self.stride < self.max_length
        require(short, "data.format.stride", self.stride, "less than data.format.max_length")
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
    """Where relative data paths start, also those of evaluation: a folder or URI; null: the working directory."""
    forget: SourceConfig = field(default_factory=lambda: SourceConfig(path=BUILTIN_FORGET))
    """Rows to forget; all are used, in a new order in each epoch."""
    retain: SourceConfig = field(default_factory=lambda: SourceConfig(path="builtin:people/retain.jsonl"))
    """Rows to keep; streamed."""
    holdout: SourceConfig | None = None
    """Rows like the forget rows that the model has never seen: they set how far to forget (ofmu.forget_level). null:
    none, except that the built-in forget rows have built-in ones."""
    test: SourceConfig | None = None
    """Test rows of image classification; null: none."""
    split: SplitConfig | None = None
    """Forget and retain rows as parts of the rows of data.retain (data.forget is not read); null: two sources."""
    format: FormatConfig = field(default_factory=FormatConfig)
    """How a row becomes tokens."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """How a row becomes an image and its class."""
    overlap: Literal["error", "drop", "allow"] = "error"
    """Rows in both forget and retain (exact, or after normalising case and spaces). drop: from retain."""
    duplicates: Literal["error", "drop", "allow"] = "allow"
    """Duplicate rows within one source; allow keeps and reports them."""
    truncate: Literal["error", "retain", "allow"] = "retain"
    """Rows longer than data.format.max_length. retain: truncate them, except forget rows, whose last tokens would not
    be forgotten; error: refuse them; allow: truncate forget rows too."""

    def __post_init__(self) -> None:
        if self.split is not None:
            self.split.check()
            object.__setattr__(self, "forget", self.retain)
        for name, source in self.sources.items():
            source.check(f"data.{name}")
        if self.format.packed and "drop" in (self.overlap, self.duplicates):
            raise UserError(
                "data.format.packed: a window holds several documents, so none can be dropped from it: set "
                "data.overlap and data.duplicates to error or allow"
            )

    def kind(self, stream: str) -> Kind:
        """What the rows of a stream are."""
        return self.sources[stream].kind or self.format.kind

    @property
    def whole(self) -> frozenset[str]:
        """Streams whose rows must not be truncated."""
        streams = {"error": frozenset(self.sources), "retain": frozenset({"forget"}), "allow": frozenset[str]()}
        return streams[self.truncate]

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The configured sources by stream name."""
        builtin = SourceConfig(path=BUILTIN_HOLDOUT) if self.forget.path == BUILTIN_FORGET else None
        named = {"forget": self.forget, "retain": self.retain, "holdout": self.holdout or builtin, "test": self.test}
        if self.split is not None:
            for name in ("forget", "retain"):
                named[name] = PartConfig.of(self.retain, self.split, self.images.label, forgotten=name == "forget")
        return {name: source for name, source in named.items() if source is not None}


@dataclass(frozen=True, kw_only=True)
class TrainDataConfig:
    """Rows to train on."""

    root: str | None = None
    """Folder or URI that relative data paths start from; null: the working directory."""
    train: SourceConfig = field(default_factory=lambda: SourceConfig(path="builtin:people/full.jsonl"))
    """Rows to train on."""
    split: SplitConfig | None = None
    """Leave out the rows that this split of data.train forgets: what a retrained model is trained on. null: none."""
    format: FormatConfig = field(default_factory=FormatConfig)
    """How a row becomes tokens."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """How a row becomes an image and its class."""
    duplicates: Literal["error", "drop", "allow"] = "allow"
    """Duplicate rows; allow keeps and reports them."""

    truncate: Literal["error", "allow"] = "allow"
    """Rows longer than data.format.max_length: refuse or truncate them."""

    def __post_init__(self) -> None:
        self.train.check("data.train")
        if self.split is not None:
            self.split.check()

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The configured source by stream name."""
        return {"train": self.train}

    def kind(self, stream: str) -> Kind:
        """What the rows of the stream are."""
        return self.sources[stream].kind or self.format.kind

    @property
    def whole(self) -> frozenset[str]:
        """Streams whose rows must not be truncated."""
        return frozenset({"train"} if self.truncate == "error" else ())

    @property
    def source(self) -> SourceConfig:
        """The rows to train on, without those that `split` forgets."""
        if self.split is None:
            return self.train
        return PartConfig.of(self.train, self.split, self.images.label, forgotten=False)
