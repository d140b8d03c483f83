"""A small Llama with seeded random weights, and a vocabulary learned from its training rows."""

from __future__ import annotations

from typing import Any

from ofmu_ray.config import ModelConfig, TrainConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage import PathLike, atomic_dir


def write_initial_model(folder: PathLike, config: TrainConfig) -> None:
    """Write a Hugging Face directory with configuration, weights and tokenizer; deterministic for a seed.

    Raises:
        UserError: the rows or the tokenizer cannot be read.
    """
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.disable_progress_bar()

    scratch = config.scratch
    tokenizer = _tokenizer(config)
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=scratch.hidden_size,
            intermediate_size=scratch.intermediate_size,
            num_hidden_layers=scratch.layers,
            num_attention_heads=scratch.heads,
            num_key_value_heads=scratch.kv_heads,
            max_position_embeddings=scratch.max_length,
            tie_word_embeddings=scratch.tie_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with atomic_dir(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _tokenizer(config: TrainConfig) -> Any:
    if config.tokenizer is not None:
        from ofmu_ray.models.loading import load_tokenizer

        return load_tokenizer(ModelConfig(path=config.tokenizer))
    from ofmu_ray.data import sources
    from ofmu_ray.data.vocabulary import build_tokenizer

    form = config.data.format
    if config.data.kind("train") == "messages":
        raise UserError("data.format.kind = messages: a vocabulary has no chat template; name a tokenizer with one")
    names = [form.text] if config.data.kind("train") == "text" else [form.question, form.answer]
    layout = "{text}" if len(names) == 1 else form.prompt_template.replace("{question}", "{text}")
    pieces = sources.fragments(config.data.train, config.data.root, stream="train", option="data.train")
    rows = (row for piece in pieces for _, row in sources.read(piece, names))
    # data preparation refuses unreadable and incomplete rows, with their numbers
    texts = (
        " ".join([layout.replace("{text}", str(row[names[0]])), *(str(row[name]) for name in names[1:])])
        for row in rows
        if isinstance(row, dict) and set(names) <= row.keys()
    )
    return build_tokenizer(texts, config.scratch.vocab_size, max_length=config.scratch.max_length)
