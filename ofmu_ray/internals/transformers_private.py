"""What is borrowed from transformers."""

from __future__ import annotations

from typing import Any

from ofmu_ray.internals.contract import check_attributes

MODEL = ("_can_set_attn_implementation", "set_attn_implementation")
"""Attributes of every PreTrainedModel."""
CONFIG = ("_attn_implementation",)
"""Of its configuration."""


def takes_attention(model: Any) -> bool:
    """Whether the model asks transformers' AttentionInterface for its attention; False for other modules."""
    can_set = getattr(model, MODEL[0], None)
    return can_set is not None and bool(can_set())


def attention_of(model: Any) -> str:
    """The name of the attention in use, as `set_attn_implementation` takes it."""
    check_attributes("transformers", model.config, CONFIG)
    return str(model.config._attn_implementation)
