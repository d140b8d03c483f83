"""A model and its micro-batches without their content: what planning needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ofmu_ray.assets import model_source
from ofmu_ray.config import ModelConfig
from ofmu_ray.data.batch import REFUSAL
from ofmu_ray.data.sidecar import KEYS
from ofmu_ray.engines.layers import chosen_layer, decoder_layers
from ofmu_ray.errors import UserError
from ofmu_ray.methods.protocol import Need
from ofmu_ray.models.loading import _enable_checkpointing, add_lora, disable_dropout, freeze_matching


def model_shape(config: ModelConfig) -> Any:
    """The Hugging Face configuration of model.path; no weights are read.

    Raises UserError when there is none.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(
            model_source(config.path), trust_remote_code=config.trust_remote_code
        )
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError and transformers' own
        raise UserError(f"model.path = {config.path!r}: no configuration of a model: {error}") from None


def empty_model(shape: Any, config: ModelConfig, device: str = "meta") -> torch.nn.Module:
    """The model with adapters, frozen parts and checkpointing as the engine gets it, on `device`.

    On the meta device it holds no storage; elsewhere its weights are random.
    """
    import transformers

    with torch.device(device):
        module: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
            shape,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
        if config.lora is not None:
            module = add_lora(module, config.lora)
    freeze_matching(module, config.freeze)
    disable_dropout(module)
    if config.gradient_checkpointing:
        _enable_checkpointing(module, config)
    return module.train()


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
    labels[:, :prompt] = -100
    return {
        "input_ids": torch.zeros(rows, tokens, dtype=torch.long),
        "attention_mask": torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta"),
        "labels": labels,
    }
