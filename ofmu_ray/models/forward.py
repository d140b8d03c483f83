"""A model's forward over tokens that are no batch of rows: each has a position, and the caller says who sees whom.

Trees of texts (`tree.py`) and steps of generations (`continuation.py`) go through a model in this form. It works
for any model that asks transformers' AttentionInterface for its attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from ofmu_ray.internals.transformers_private import attention_of
from ofmu_ray.models.answers import head_on

_ATTENTION = "ofmu"
_HARMLESS = {"dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions"}
"""Options of an attention call that change nothing here: no dropout in evaluation, the caller says who sees whom."""


class Attend(Protocol):
    """Attention of one pass. What it keeps of the keys and values is its own matter."""

    def __call__(
        self, layer: int, query_nhd: torch.Tensor, key_nkd: torch.Tensor, value_nkd: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """[tokens, heads, width] each, key heads may be fewer -> [tokens, heads, width of a value]."""
        ...


class Forward:
    """The model's own forward, with attention by the caller."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ignored: set[str] = set()
        """Options of the model's attention that were not heeded so far (score caps, biases, sinks)."""

    def __call__(
        self, ids_n: torch.Tensor, positions_n: torch.Tensor, attend: Attend, predicting_m: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [m, vocabulary] of the tokens at the places `predicting_m`, or of all of them."""
        call = _Call(attend, self.ignored)
        token = _now.set(call)
        try:
            with _attending(self.model), head_on(self.model, lambda hidden: _chosen(hidden, predicting_m)):
                output = self.model(input_ids=ids_n[None], position_ids=positions_n[None], use_cache=False)
        finally:
            _now.reset(token)
        logits: torch.Tensor = output.logits
        wanted = len(ids_n) if predicting_m is None else len(predicting_m)
        # a model that does not call its head as a module gives all positions
        return (logits if logits.shape[1] == wanted else _chosen(logits, predicting_m))[0]


def _chosen(states_1n: torch.Tensor, places_m: torch.Tensor | None) -> torch.Tensor:
    return states_1n if places_m is None else states_1n[:, places_m]


class _Call:
    """One forward: what its attention calls, in the order of the layers, are given to."""

    def __init__(self, attend: Attend, ignored: set[str]) -> None:
        self.attend = attend
        self.ignored = ignored
        self.layer = -1


_now: ContextVar[_Call] = ContextVar("now")


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """[1, heads, tokens, width] each -> [1, tokens, heads, width], for transformers' AttentionInterface."""
    call = _now.get()
    call.layer += 1
    call.ignored.update(name for name, value in options.items() if value is not None and name not in _HARMLESS)
    query_nhd, key_nkd, value_nkd = (each[0].transpose(0, 1) for each in (query, key, value))
    return call.attend(call.layer, query_nhd, key_nkd, value_nkd, scaling)[None], None


AttentionInterface.register(_ATTENTION, _attention)


@contextmanager
def _attending(model: Any) -> Iterator[None]:
    """Within the context the model's attention is `_attention`."""
    usual = attention_of(model)
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
