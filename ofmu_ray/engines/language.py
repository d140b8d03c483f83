"""The causal language model's loss on a micro-batch of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100
"""Label of a position without a loss (prompt and padding)."""


def causal_lm_loss(module: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the token negative log-likelihoods (nats) and the number of labelled tokens.

    `batch`: input_ids, attention_mask, labels, each int64 [rows, positions]; labels are -100 where there is no loss.
    Labelled positions are selected before the upcast, so that fp32 logits exist for the answer's tokens only.
    """
    output = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    labels = batch["labels"][:, 1:]
    labelled = labels != IGNORED
    logits_tv = output.logits[:, :-1][labelled]
    wide = logits_tv.float() if logits_tv.dtype in (torch.bfloat16, torch.float16) else logits_tv
    return functional.cross_entropy(wide, labels[labelled], reduction="sum"), labelled.sum()
