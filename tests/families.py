"""Tiny random models of the families in docs/usage.md, by the names of their configurations in transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers

from ofmu_ray import unlearn
from ofmu_ray.config import (
    DataConfig,
    EvaluationConfig,
    EvaluationSetsConfig,
    ModelConfig,
    TrackingConfig,
    TrainingConfig,
    UnlearnConfig,
)
from ofmu_ray.models.loading import load_tokenizer
from ofmu_ray.runs.outcome import Outcome

_SIZES = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
_SIZES |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}  # far from uniform predictions
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_UNTIED = {"sliding_window": 16, "tie_word_embeddings": False}  # a random tied model repeats its input forever

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "Llama": {},
        "Mistral": {"sliding_window": 16},
        "Qwen2": {},
        "Qwen3": {},
        "Gemma2": _UNTIED,
        "Gemma3Text": _UNTIED,
        "Phi": {},
        "Phi3": {"pad_token_id": 0},
        "Olmo2": {},
        "SmolLM3": {"pad_token_id": 0},
        "Granite": {},
        "Cohere": {},
        "StableLm": {},
        "GPT2": {},
        "GPTNeoX": {},
        "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48},
        "Bloom": {"n_layer": 2, "n_head": 4},
        "Falcon": {"head_dim": None},
    },
    "experts": {"Mixtral": {"num_local_experts": 4}, "Qwen3Moe": _EXPERTS},
    "recurrent": {
        "Mamba": {"state_size": 4},
        "FalconMamba": {"state_size": 4},
        "Mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    },
    "hybrid": {
        "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "num_experts": 2},
        "RecurrentGemma": {"num_hidden_layers": 3, "attention_window_size": 16},
        "Lfm2": {"layer_types": ["conv", "full_attention"]},
        "Qwen3Next": {**_EXPERTS, **_DELTA, "layer_types": ["linear_attention", "full_attention"]},
        "FalconH1": {**_MAMBA, "mamba_d_ssm": 64},
        "Bamba": {**_MAMBA, "attn_layer_indices": [1]},
        "Zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "chunk_size": 16, "num_mem_blocks": 1},
        "GraniteMoeHybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    },
}
"""Kind -> family -> what its configuration has besides the sizes."""
FAMILIES = dict(itertools.chain(*(kind.items() for kind in KINDS.values())))


def family_model(family: str, seed: int = 0) -> Any:
    """A random model, reproducible by seed."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(family_config(family)).eval()


def family_config(family: str) -> Any:
    """Its configuration (transformers)."""
    options = {name: value for name, value in (_SIZES | FAMILIES[family]).items() if value is not None}
    return getattr(transformers, f"{family}Config")(**options)


def tiny_run(
    folder: Path,
    model: Any,
    data: DataConfig,
    tracked: str,
    chat_template: str | None = None,
    sets: EvaluationSetsConfig | None = None,
) -> Outcome:
    """Two rounds on the model in this process, evaluated with generations. `tracked`: MLflow's database."""
    model.save_pretrained(folder / "model")
    tokenizer = load_tokenizer(ModelConfig())
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder / "model")
    return unlearn(
        UnlearnConfig(
            name="run",
            storage=str(folder / "runs"),
            model=ModelConfig(path=str(folder / "model")),
            data=data,
            training=TrainingConfig(rounds=2, batch_size=2),
            evaluation=EvaluationConfig(
                sets=sets or EvaluationSetsConfig(), retrained=None, max_new_tokens=8, batch_size=4
            ),
            tracking=TrackingConfig(uri=tracked, system_metrics=False),
        )
    )
