"""Which models are causal language models, and what their attention supports."""

from __future__ import annotations

from typing import Any

from ofmu_ray.config import ModelConfig
from ofmu_ray.errors import UserError


def check_causal(shape: Any, config: ModelConfig, option: str = "model.path") -> None:
    """Refuse encoders, encoder-decoders and models without a language head; code from a repository is trusted.

    `shape`: the model's configuration (transformers).

    Raises:
        UserError: not a causal language model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING

    if config.trust_remote_code and getattr(shape, "auto_map", None):
        return
    named = list(shape.architectures or ())
    what = f"{named[0] if named else type(shape).__name__}"
    encoder = type(shape) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(shape, "is_decoder", False)
    if _model_class(shape) is None:
        problem = "not a causal language model"
    elif getattr(shape, "is_encoder_decoder", False):
        problem = "an encoder-decoder, not a causal language model"
    elif encoder:
        problem = "an encoder, not a causal language model"
    elif named and not set(named) & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        problem = "without the head of a causal language model"
    else:
        return
    raise UserError(
        f"{option} = {config.path!r}: {what} is {problem}; give a model that AutoModelForCausalLM loads, such as "
        "Llama, Qwen, Gemma or GPT-NeoX"
    )


def attention_of(shape: Any, config: ModelConfig) -> str:
    """model.attention; `eager` where the architecture does not have the kernel `sdpa`."""
    known = _model_class(shape)
    return "eager" if known is not None and not known._supports_sdpa else config.attention


def _model_class(shape: Any) -> Any:
    """transformers' class for a configuration; None: there is none for causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(shape), None)
