"""Options of `ofmu requests`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

from ofmu_ray.config.data import SourceConfig
from ofmu_ray.config.overrides import apply_overrides
from ofmu_ray.config.promotion import RECIPES, PromotionConfig, RecipeConfig
from ofmu_ray.config.ranges import positive, require
from ofmu_ray.config.runs import UnlearnConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage import is_uri, join


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """The HTTP service."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback belongs behind a proxy that ends TLS."""
    port: int = 8321
    """Port to listen on; 0: any free one."""
    largest_body: int = 262_144
    """Largest body of a request (bytes)."""
    rate: int = 600
    """Requests per minute and token (of unknown tokens: per address)."""
    proxy_headers: bool = False
    """Take the caller's address and https from the headers of a proxy on this machine, X-Forwarded-For and -Proto. Only
    behind one that sets them itself: anybody else's would be believed."""

    def __post_init__(self) -> None:
        positive("requests.service", self, "largest_body", "rate")
        require(0 <= self.port < 65536, "requests.service.port", self.port, "from 0 to 65535")


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Requests to forget: where they are kept, and what is accepted."""

    ledger: str | None = None
    """sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE; null: sqlite:///STORAGE/requests/ledger.db."""
    key_file: str | None = None
    """File with the master key, 32 bytes in base64; null: STORAGE/requests/master.key, or requests.key_env."""
    key_env: str | None = None
    """Environment variable with the master key, which a secret store fills; takes precedence over the file."""
    train: SourceConfig = field(default_factory=lambda: SourceConfig(path="builtin:people/full.jsonl"))
    """The training data of the model, in which requested rows are looked up."""
    deadline: str = "30d"
    """Time to answer a request (d, h, m or s); GDPR gives a month."""
    keep_rows: str = "90d"
    """How long after its promotion a request's texts stay readable, for checks that they are still forgotten."""
    lease_seconds: int = 300
    """How long a processor holds the ledger without renewing."""
    largest_share: float = 0.5
    """Largest share of the training data that one request may name."""
    service: ServiceOptions = field(default_factory=ServiceOptions)
    """The HTTP service."""
    promotion: PromotionConfig = field(default_factory=PromotionConfig)
    """Gates, recipes, registry and signing keys."""

    def __post_init__(self) -> None:
        positive("requests", self, "lease_seconds")
        require(self.lease_seconds <= LONGEST_LEASE, "requests.lease_seconds", self.lease_seconds, "at most a week")
        require(bool(duration("requests.deadline", self.deadline)), "requests.deadline", self.deadline, "longer than 0")
        duration("requests.keep_rows", self.keep_rows)
        require(0 < self.largest_share <= 1, "requests.largest_share", self.largest_share, "in (0, 1]")
        self.train.check("requests.train")


@dataclass(frozen=True, kw_only=True)
class RequestsConfig(UnlearnConfig):
    """`ofmu requests`: all options of `ofmu unlearn`, which works the requests off, and section requests."""

    requests: RequestOptions = field(default_factory=RequestOptions)
    """Requests to forget."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task != "causal_lm":
            raise UserError(f"task = {self.task}: requests forget questions and answers of language models")
        if self.export.push_to_hub is not None:
            raise UserError("export.push_to_hub: would send models before their gates; send the promoted one yourself")
        if self.data.split is not None:
            raise UserError("data.split: it would replace the requested rows by a part of data.retain; drop it")
        for option, kind in (("requests.train", self.requests.train.kind), ("data.format", self.data.format.kind)):
            if kind not in (None, "qa"):
                raise UserError(
                    f"{option}.kind = {kind}: requests forget questions and answers (kind qa), no documents or chats; "
                    "`ofmu unlearn` forgets those"
                )
        for recipe in self.requests.promotion.ladder:
            self.with_recipe(recipe)

    def with_recipe(self, recipe: RecipeConfig) -> UnlearnConfig:
        """The options of `ofmu unlearn`, with those of a recipe of the ladder.

        Raises:
            UserError: no such option, or a value with the wrong type or out of range.
        """
        plain = UnlearnConfig(**{each.name: getattr(self, each.name) for each in fields(UnlearnConfig)})
        options: dict[str, Any] = dict(recipe.options)
        if recipe.rounds_factor is not None:
            options["training.rounds"] = max(1, round(recipe.rounds_factor * plain.training.rounds))
        return apply_overrides(plain, options, option=f"{RECIPES}: {recipe.name}: ")

    @property
    def ledger_uri(self) -> str:
        """`requests.ledger`, or the default in the storage; UserError for a storage at a URI."""
        if self.requests.ledger is not None:
            return self.requests.ledger
        require(not is_uri(self.storage), "requests.ledger", None, "set, because storage is a URI: use PostgreSQL")
        return f"sqlite:///{self.requests_folder}/ledger.db"

    @property
    def key_file(self) -> str | None:
        """`requests.key_file`, or the default in the storage."""
        if self.requests.key_file is not None or is_uri(self.storage):
            return self.requests.key_file
        return f"{self.requests_folder}/master.key"

    @property
    def signing_keys(self) -> str:
        """`requests.promotion.keys`, or the default in the storage; UserError for a storage at a URI."""
        if self.requests.promotion.keys is not None:
            return self.requests.promotion.keys
        require(not is_uri(self.storage), "requests.promotion.keys", None, "set, because storage is a URI")
        return f"{self.requests_folder}/keys"

    @property
    def requests_folder(self) -> str:
        """Where the ledger and what belongs to it are kept."""
        return join(self.storage, "requests")


_UNITS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
LONGEST = timedelta(days=36_500)
"""A century: calendars end, and a longer time is a slip of the finger."""
LONGEST_LEASE = 7 * 86_400


def duration(option: str, text: str) -> timedelta:
    """'30d', '12h', '90m', '10s' -> a time span; UserError naming the option otherwise, and beyond `LONGEST`.

    The text is not repeated: it may come from outside.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*([dhms])\s*", text)
    if match is None:
        raise UserError(f"{option}: must be a number and d, h, m or s, such as 30d")
    found = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if found > LONGEST:
        raise UserError(f"{option}: must be at most {LONGEST.days}d")
    return found
