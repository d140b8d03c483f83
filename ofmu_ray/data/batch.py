"""The data of one gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = -100
"""Label of a token without a loss (torch's cross_entropy default)."""

REFUSAL = "refusal_"
"""Prefix of names in a micro-batch for the text that replaces an answer: a refusal or an alternative."""


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch: micro-batches for the engine's loss, all of one kind."""

    micro: Sequence[Any]
    row_ids: Sequence[str] = ()
