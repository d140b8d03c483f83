"""Causal language models: loading, freezing, adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ofmu_ray.config import LoraConfig, ModelConfig
from ofmu_ray.errors import UserError
from ofmu_ray.models.answers import unwrapped
from ofmu_ray.models.causal import attention_of
from ofmu_ray.models.source import adapter_base, model_source
from ofmu_ray.models.stored_names import frozen

# where implementations keep an attention layer's dropout probability as a plain number
_DROPOUT_NUMBERS = ("attention_dropout", "attn_dropout", "hidden_dropout", "dropout", "dropout_p", "activation_dropout")


def load_causal_lm(config: ModelConfig) -> tuple[torch.nn.Module, Any]:
    """The model and its tokenizer, ready for an engine: dropout off, frozen parts frozen, adapters added.

    The weights are fp32, or bf16 for precision bf16. Raises UserError with model.path and the cause if something does
    not load, if an expression of model.freeze matches nothing, or if no parameter is left to train.
    """
    shape = read_config(config.path, trust_remote_code=config.trust_remote_code)
    module = pretrained(config.path, **options_of(config, shape))
    tokenizer = load_tokenizer(config)
    return ready(module, config), tokenizer


def options_of(config: ModelConfig, shape: Any) -> dict[str, Any]:
    """Options for transformers to load a model for training; `shape`: its configuration."""
    return {
        "dtype": torch.bfloat16 if config.precision == "bf16" else torch.float32,
        "attn_implementation": attention_of(shape, config),
        "trust_remote_code": config.trust_remote_code,
    }


def ready(module: torch.nn.Module, config: ModelConfig) -> torch.nn.Module:
    """The model with adapters and checkpointing, frozen parts frozen, dropout off, in training mode."""
    if config.lora is not None:
        module = add_lora(module, config.lora)
    freeze_matching(module, config.freeze)
    disable_dropout(module)
    if config.gradient_checkpointing:
        _enable_checkpointing(module, config)
    return module.train()  # transformers checkpoints activations in training mode only


def pretrained(path: str, option: str = "model.path", **options: Any) -> Any:
    """Load a causal language model from safetensors, with these options of transformers and without a progress bar.

    An adapter alone (peft) is merged into its base.

    Raises:
        UserError: loading failed; names `option`.
    """
    import transformers

    with does_not_load(path, option), quiet():
        source = model_source(path, option)
        base = adapter_base(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source if base is None else model_source(base, option), use_safetensors=True, **options
        )
        return model if base is None else _with_adapter(model, source)


@contextmanager
def does_not_load(path: str, option: str, kind: str = "a causal language model") -> Iterator[None]:
    """Turn errors of transformers inside the block into a UserError that names `option`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a broken directory may raise OSError, KeyError, ValueError, SafetensorError
        raise UserError(
            f"{option} = {path!r} does not load: {_one_line(error)}. It must be a Hugging Face model directory or hub "
            f"name of {kind} with safetensors weights"
        ) from error


def _with_adapter(model: Any, source: str) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(model, source).merge_and_unload()  # type: ignore[operator]


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of transformers for loading and saving."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_config(path: str, option: str = "model.path", *, trust_remote_code: bool = False) -> Any:
    """A model's configuration (transformers), without its weights.

    Raises:
        UserError: it does not load; names `option`.
    """
    import transformers

    with does_not_load(path, option):
        source = model_source(path, option)
        base = adapter_base(source)
        if base is not None:
            source = model_source(base, option)
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def empty_model(shape: Any, config: ModelConfig, device: str = "meta") -> torch.nn.Module:
    """The model with adapters, frozen parts and checkpointing as passed to the engine, on `device`.

    `shape`: from `read_config`. On the meta device it has no storage; elsewhere its weights are random.
    """
    import transformers

    with torch.device(device):
        return ready(transformers.AutoModelForCausalLM.from_config(shape, **options_of(config, shape)), config)


def load_tokenizer(config: ModelConfig, option: str | None = None) -> Any:
    """The tokenizer of model.tokenizer, else the model's; padding on the right, with a pad token.

    Raises:
        UserError: it does not load, or has no end-of-sequence token; names `option`, or its source.
    """
    import transformers

    path = config.tokenizer or config.path
    option = option or ("model.tokenizer" if config.tokenizer else "model.path")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_source(path, option), trust_remote_code=config.trust_remote_code
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option} = {path!r} has no usable tokenizer: {_one_line(error)}") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # without files, transformers makes an empty one
        raise UserError(f"{option} = {path!r} has no tokenizer files: set model.tokenizer to a directory with them")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{option} = {path!r}: its tokenizer has no end-of-sequence token; add eos_token to it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def add_lora(module: torch.nn.Module, lora: LoraConfig) -> torch.nn.Module:
    """The model with low-rank adapters, fp32 whatever its weights are; only they are trained."""
    import peft

    try:
        wrapped: torch.nn.Module = peft.get_peft_model(
            module,  # type: ignore[arg-type]
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=0.0,
                target_modules=lora.target_modules or "all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise UserError(f"model.lora.target_modules = {lora.target_modules!r}: {_one_line(error)}") from error
    _refuse_tied(wrapped, lora)
    return wrapped


def _refuse_tied(module: torch.nn.Module, lora: LoraConfig) -> None:
    """Refuse an adapter of a weight that two modules share: merged, it would change the other one, too."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removeprefix("base_model.model."))
    for tied in names.values():
        adapted = [name.removesuffix(".base_layer.weight") for name in tied if name.endswith(".base_layer.weight")]
        if adapted and len(tied) > 1:
            others = ", ".join(name.removesuffix(".weight") for name in tied if not name.startswith(adapted[0]))
            raise UserError(
                f"model.lora.target_modules = {lora.target_modules!r}: {adapted[0]} shares its weight with {others} "
                "(tie_word_embeddings), which its adapter would change, too, once merged: leave it out"
            )


def freeze_matching(module: torch.nn.Module, expressions: Sequence[str]) -> None:
    """Freeze every parameter whose name matches one of the regular expressions (re.search)."""
    named = dict(module.named_parameters(remove_duplicate=False))
    for pattern in frozen(expressions, list(named)):
        for name, parameter in named.items():
            if pattern.search(name):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UserError(f"model.freeze = {list(expressions)!r} freezes every parameter: nothing is left to train")


def disable_dropout(module: torch.nn.Module) -> None:
    """Set every dropout probability to 0, including those that attention layers keep as plain numbers."""
    for part in module.modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name in _DROPOUT_NUMBERS:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def _enable_checkpointing(module: Any, config: ModelConfig) -> None:
    if not getattr(module, "supports_gradient_checkpointing", True):
        raise UserError(f"model.gradient_checkpointing: {config.path!r} does not support it; set it to false")
    if config.lora is not None:
        module.enable_input_require_grads()
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def copy_with(module: Any, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A model with these weights on the module's device; the module itself may be sharded, bf16 or wrapped (LoRA)."""
    from transformers import AutoModelForCausalLM

    base = unwrapped(module)
    device = next(module.parameters()).device
    dtype = torch.float32 if device.type == "cpu" else next(iter(weights.values())).dtype
    with torch.random.fork_rng(), device:  # the initial weights must not advance the run's generator
        model: Any = AutoModelForCausalLM.from_config(base.config, dtype=dtype)
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys  # tied weights occur once
    assert not unexpected, f"weights that the model's configuration does not have: {unexpected[:3]}"
    model.tie_weights()
    copied: torch.nn.Module = model.eval()
    return copied
