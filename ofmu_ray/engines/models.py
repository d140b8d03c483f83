"""Causal language models: loading, freezing, adapters, and the weights to export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

Gathered = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[object]]


def disable_dropout(module: torch.nn.Module) -> None:
    """Set every dropout probability to 0, also those that attention layers keep as a number."""
    for part in module.modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "hidden_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def exported_weights(module: torch.nn.Module, gathered: Gathered, *, keep: bool) -> dict[str, torch.Tensor] | None:
    """State dict in host memory, parameter by parameter through `gathered`; None unless `keep`.

    Tied parameters stay one tensor under their several names.
    """
    weights: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in copies:
            with gathered([parameter]):
                copies[id(parameter)] = parameter.detach().to("cpu", copy=True) if keep else torch.empty(0)
        weights[name] = copies[id(parameter)]
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        if name in persistent:
            weights[name] = buffer.detach().to("cpu", copy=True)
    return weights if keep else None
