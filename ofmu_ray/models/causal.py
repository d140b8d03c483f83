"""Which models are causal language models, and what their attention supports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ofmu_ray.config import ModelConfig
from ofmu_ray.errors import UserError
from ofmu_ray.internals.transformers_private import supports_flash, supports_sdpa

NOT_GENERATIVE = ("MaskedLM", "PreTraining", "Classification", "QuestionAnswering", "MultipleChoice", "Prediction")
"""Ends of the names of classes that do not generate."""


def check_folder(folder: Path, option: str) -> None:
    """Refuse what config.json already shows to be another kind of model, before transformers is imported.

    Raises:
        UserError: not a causal language model.
    """
    try:
        content = json.loads((folder / "config.json").read_text())
        named, pair = list(content.get("architectures") or ()), bool(content.get("is_encoder_decoder"))
    except (OSError, ValueError, AttributeError):
        return  # transformers says what is wrong
    if pair or (named and all(str(name).endswith(NOT_GENERATIVE) for name in named)):
        raise _refused(option, str(folder), ", ".join(named) or "its config.json")


def check_causal(shape: Any, config: ModelConfig, option: str = "model.path") -> None:
    """Refuse encoders, encoder-decoders and models without a language head; code from a repository is trusted.

    `shape`: the model's configuration (transformers).

    Raises:
        UserError: not a causal language model.
    """
    import transformers

    if config.trust_remote_code and getattr(shape, "auto_map", None):
        return
    named, known = list(shape.architectures or ()), _model_class(shape)
    encoder = type(shape) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(shape, "is_decoder", False)
    pair = getattr(shape, "is_encoder_decoder", False)
    classes = [getattr(transformers, name, None) for name in named]
    headless = named and not any(kind and issubclass(kind, transformers.GenerationMixin) for kind in classes)
    if known is None or encoder or pair or headless:
        raise _refused(option, config.path, ", ".join(named) or type(shape).__name__)


def check_trainable(shape: Any, config: ModelConfig) -> None:
    """Raise UserError if the weights of the model to change are quantised. `shape`: its configuration."""
    scheme = getattr(shape, "quantization_config", None)
    if scheme is not None:
        method = scheme.get("quant_method") if isinstance(scheme, dict) else getattr(scheme, "quant_method", None)
        raise UserError(
            f"model.path = {config.path!r}: its weights are quantised ({method}), which no engine trains: give a copy "
            "of the model in fp32, bf16 or fp16"
        )


def _refused(option: str, path: str, what: str) -> UserError:
    return UserError(
        f"{option} = {path!r}: {what} is not a causal language model; give one that AutoModelForCausalLM loads "
        "with its head, such as Llama, Qwen, Gemma or GPT-NeoX"
    )


def attention_of(shape: Any, config: ModelConfig) -> str:
    """model.attention, or what this process takes instead: `eager` where the architecture has no `sdpa`."""
    known, wanted = _model_class(shape), config.attention
    if wanted == "flash_attention_2":
        if _no_flash(known, config) is None:
            return wanted
        wanted = "sdpa"
    return "eager" if known is not None and not supports_sdpa(known) else wanted


def flash_note(shape: Any, config: ModelConfig) -> str | None:
    """Why this process takes another attention than flash_attention_2; None: it does not, or was not asked to."""
    reason = _no_flash(_model_class(shape), config) if config.attention == "flash_attention_2" else None
    return None if reason is None else f"{reason}; {attention_of(shape, config)} attention is used instead"


def _no_flash(known: Any, config: ModelConfig) -> str | None:
    from transformers.utils import is_flash_attn_2_available

    if config.precision != "bf16":
        return f"flash_attention_2 computes in bf16 and model.precision = {config.precision} has passes in fp32"
    if not is_flash_attn_2_available():
        return "flash-attn is not installed here, or there is no GPU"
    if known is not None and not supports_flash(known):
        return f"{known.__name__} has no flash_attention_2"
    return None


def _model_class(shape: Any) -> Any:
    """transformers' class for a configuration; None: there is none for causal language models."""
    import transformers

    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(shape), None)
