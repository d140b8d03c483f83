"""A model and its micro-batches without content, as planning needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ofmu_ray.data.batch import IGNORED
from ofmu_ray.features.protocol import Need, ParameterValues, Tokens


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
    """`rows` rows of `tokens` tokens, the first `prompt` of them without a loss, with the features in `needs`.

    Ids and labels are real, as they determine sizes. The rest is on the meta device: the attention mask
    [rows, 1, tokens, tokens], already expanded, and the features.
    """
    text = shape.get_text_config()
    batch = _texts(rows, tokens, prompt)
    for need in needs:
        if isinstance(need.feature, ParameterValues):
            continue
        texts, values = (need.feature, None) if isinstance(need.feature, Tokens) else (need.of, need.feature)
        prefix = "" if texts is None else texts.prefix
        if prefix:
            batch |= {prefix + name: tensor for name, tensor in _texts(rows, tokens, prompt).items()}
        if values is not None:
            entries = rows * values.entries({"input_ids": range(tokens), "prompt_tokens": prompt})
            batch[prefix + values.key] = torch.empty((entries, *values.shape(text)), device="meta")
            if module is not None:
                values.check(module)  # fails now if the model has no such layer
    return batch


def _texts(rows: int, tokens: int, prompt: int) -> dict[str, torch.Tensor]:
    labels = torch.ones(rows, tokens, dtype=torch.long)
    labels[:, :prompt] = IGNORED
    return {
        "input_ids": torch.zeros(rows, tokens, dtype=torch.long),
        "attention_mask": torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta"),
        "labels": labels,
    }
