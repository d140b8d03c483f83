"""A model and its micro-batches without their content: what planning needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ofmu_ray.data.batch import IGNORED, REFUSAL
from ofmu_ray.data.sidecar import KEYS
from ofmu_ray.engines.layers import chosen_layer, decoder_layers
from ofmu_ray.methods.protocol import Need


def parameter_counts(module: torch.nn.Module) -> tuple[int, int]:
    """(all, trainable) elements; tied parameters count once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def micro_batch(
    shape: Any,
    rows: int,
    tokens: int,
    prompt: int,
    needs: Sequence[Need] = (),
    module: torch.nn.Module | None = None,
) -> dict[str, torch.Tensor]:
    """`rows` rows of `tokens` tokens, the first `prompt` of them without a loss, with what `needs` ask for.

    Ids and labels are real, for what they select has a size. The rest is on the meta device: the attention mask
    [rows, 1, tokens, tokens], expanded as attention wants it, and what `needs` ask for.
    """
    text = shape.get_text_config()
    batch = _texts(rows, tokens, prompt)
    answer = rows * (tokens - prompt)
    for need in needs:
        if need.quantity in ("refusal", "alternative", "refusal_nll"):
            batch |= {REFUSAL + name: tensor for name, tensor in _texts(rows, tokens, prompt).items()}
        sizes: dict[str, tuple[int, ...]] = {
            "nll": (rows,),
            "refusal_nll": (rows,),
            "logits": (answer, text.vocab_size),
            "activations": (answer, text.hidden_size),
        }
        if need.quantity in sizes:
            batch[KEYS[need.quantity]] = torch.empty(sizes[need.quantity], device="meta")
    if module is not None and needs:
        for need in needs:  # says so now when the model has no such layer
            if need.layer is not None:
                chosen_layer(need.layer, len(decoder_layers(module)))
    return batch


def _texts(rows: int, tokens: int, prompt: int) -> dict[str, torch.Tensor]:
    labels = torch.ones(rows, tokens, dtype=torch.long)
    labels[:, :prompt] = IGNORED
    return {
        "input_ids": torch.zeros(rows, tokens, dtype=torch.long),
        "attention_mask": torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta"),
        "labels": labels,
    }
