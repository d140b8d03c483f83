"""Tiny random models and a tokenizer for the evaluation tests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 320
_SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
_LLAMA = {
    **_SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform predictions
}
_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _LLAMA),
    "qwen2_sliding": (
        transformers.Qwen2Config,
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2": (transformers.Qwen2Config, _LLAMA),
    "gemma2_softcap": (
        transformers.Gemma2Config,
        {
            **_LLAMA,
            "head_dim": 8,
            "sliding_window": 16,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": False,  # with tied weights, a random model repeats its input forever
        },
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig,
        {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    ),
    "gpt2": (
        transformers.GPT2Config,
        {**_SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3},
    ),
}
ARCHITECTURES = list(_CONFIGS)


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode, reproducible by seed. `changes`: changes to its configuration."""
    config_class, options = _CONFIGS[architecture]
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config_class(**{**options, **changes})).eval()


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Any:
    """Byte-level BPE over a few sentences, with BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Question: who is person 0123456789?\nAnswer: the answer is long"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
