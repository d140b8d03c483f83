"""Tiny models and batches for the engine tests."""

from __future__ import annotations

import re
from typing import Any

import torch

VOCABULARY = 96


def tiny_model(kind: str = "llama", *, tie: bool = False, seed: int = 0) -> torch.nn.Module:
    """A language model of about 30 thousand parameters, in fp32, eager attention."""
    import transformers

    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tie,
        "attn_implementation": "eager",
        "initializer_range": 0.1,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, **common)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(num_key_value_heads=2, **common)
    elif kind == "mixtral":
        config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **common)
    else:
        config = transformers.GPTNeoXConfig(attention_dropout=0.1, hidden_dropout=0.1, **common)
    return transformers.AutoModelForCausalLM.from_config(config).float()


def token_batch(lengths: list[int], seed: int) -> dict[str, torch.Tensor]:
    """Rows of the given lengths, right-padded; the first third of each row has no loss."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
    positions = torch.arange(width)
    mask = (positions < torch.tensor(lengths)[:, None]).long()
    prompt = positions < (torch.tensor(lengths)[:, None] // 3)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.where(mask.bool() & ~prompt, ids, torch.full_like(ids, -100)),
    }


def freeze(module: torch.nn.Module, pattern: str) -> None:
    for name, parameter in module.named_parameters():
        if re.search(pattern, name):
            parameter.requires_grad_(False)
