"""What the files of a model say of its parameters and layers, without importing torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig
from ofmu_ray.errors import UserError

_EMBEDDINGS = {
    "model.embed_tokens.weight": "cohere gemma gemma2 gemma3_text granite lfm2 llama mistral olmo2 phi phi3 qwen2 "
    "qwen3 smollm3 stablelm",
    "model.decoder.embed_tokens.weight": "opt",
    "transformer.wte.weight": "gpt2",
    "transformer.word_embeddings.weight": "bloom falcon",
    "backbone.embeddings.weight": "falcon_mamba mamba mamba2",
}
PLAIN = {kind: name for name, kinds in _EMBEDDINGS.items() for kind in kinds.split()}
"""Types of models whose files have the model's own names for its parameters, and their embeddings' name. Embeddings and
HEAD may be tied: then files have one of them."""
HEAD = "lm_head.weight"
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names for the number of layers in configurations."""


def check_names(config: ModelConfig, layers: Mapping[str, int]) -> None:
    """Refuse frozen parameters, adapters' modules and layers that the model does not have, as far as its files tell.

    `layers`: option -> number. What files do not tell shows once the model is built: `loading.ready`,
    `engines.layers.chosen_layer`.

    Raises:
        UserError: it does not have them; names the option.
    """
    shape = _description(config.path)
    if "auto_map" in shape or "quantization_config" in shape:
        return
    sizes = shape.get("text_config") or shape
    count = next((sizes[name] for name in LAYERS if isinstance(sizes.get(name), int)), None)
    if count is not None:
        for option, layer in layers.items():
            check_layer(layer, count, option)
    names = parameter_names(config.path) if config.freeze or config.lora is not None else None
    if names is None:
        return
    if config.lora is None:
        frozen(config.freeze, names)
    elif config.lora.target_modules:
        _check_targets(config.lora.target_modules, names)


def parameter_names(path: str) -> list[str] | None:
    """The names in a model's files, and those that may be tied to one of them; None: only transformers can tell."""
    embeddings = PLAIN.get(str(_description(path).get("model_type")))
    if embeddings is None:
        return None
    names = {embeddings, HEAD}
    try:
        for file in Path(resolve_builtin(path)).glob("*.safetensors"):
            with open(file, "rb") as content:
                names |= json.loads(content.read(int.from_bytes(content.read(8), "little"))).keys() - {"__metadata__"}
    except (OSError, ValueError, AttributeError, OverflowError, MemoryError):
        return None  # `checks.check_model` says what is wrong
    others = names - {embeddings, HEAD}
    prefixes = embeddings.partition(".")[0] + ".", HEAD.partition(".")[0] + "."
    if not others or not all(name.startswith(prefixes) for name in others):
        return None  # an old file of the model without its head
    return [embeddings, HEAD, *sorted(others)]


def frozen(expressions: Sequence[str], names: Sequence[str]) -> list[re.Pattern[str]]:
    """The expressions of model.freeze, compiled.

    Raises:
        UserError: one is not a regular expression, or matches no name (re.search).
    """
    patterns = []
    for expression in expressions:
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise UserError(f"model.freeze: {expression!r} is not a regular expression: {error}") from error
        if not any(pattern.search(name) for name in names):
            raise UserError(f"model.freeze: {expression!r} matches no parameter; names look like {names[0]!r}")
        patterns.append(pattern)
    return patterns


def check_layer(wanted: int, layers: int, option: str) -> None:
    """Raise UserError if a model of so many layers has no layer of this number, from 0."""
    if wanted >= layers:
        raise UserError(f"{option} = {wanted}: the model has layers 0 to {layers - 1}")


def _check_targets(targets: Sequence[str], names: Sequence[str]) -> None:
    """Raise UserError if PEFT would find none of the modules: their names end with a target."""
    parts = [name.split(".") for name in names]
    modules = {".".join(name[:count]) for name in parts for count in range(1, len(name))}
    if not any(f".{module}".endswith(f".{target}") for module in modules for target in targets):
        leaves = sorted({name[-2] for name in parts if "norm" not in name[-2]})
        raise UserError(
            f"model.lora.target_modules = {list(targets)!r}: the model has no such module; it has {', '.join(leaves)}"
        )


def _description(path: str) -> dict[str, Any]:
    """config.json of a folder on this machine; {} if it cannot be read."""
    try:
        content = json.loads(Path(resolve_builtin(path), "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
