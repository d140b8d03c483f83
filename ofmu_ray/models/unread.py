"""A model whose parameters are still in its files, so that an engine reads them straight to where it keeps them.

Until then a parameter is one zero, expanded to its shape. It has a shape, a dtype and a device, so that adapters,
freezing and checks work on it, but no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig
from ofmu_ray.errors import UserError
from ofmu_ray.internals.transformers_private import names_in_model
from ofmu_ray.models.loading import does_not_load, options_of, read_config, ready
from ofmu_ray.models.source import weights_folder
from ofmu_ray.models.stored import StoredTensor, stored_tensors


class UnreadWeights:
    """Parameters without values, and where their values are stored."""

    def __init__(self, places: Mapping[torch.nn.Parameter, StoredTensor]) -> None:
        self._places = dict(places)  # a parameter is hashed by identity
        self.bytes_read = 0
        """Bytes of the files that this process has read so far."""

    def __contains__(self, parameter: object) -> bool:
        return isinstance(parameter, torch.nn.Parameter) and parameter in self._places

    def read(self, parameter: torch.nn.Parameter, target: torch.Tensor, start: int = 0) -> None:
        """Copy the flattened parameter's elements from `start` on into the 1-D `target`, in its dtype."""
        self.bytes_read += self._places[parameter].read(target, start)

    def fill(self, parameter: torch.nn.Parameter) -> None:
        """Give the parameter its own memory, and its value."""
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        self.read(parameter, value.view(-1))
        parameter.data = value

    def place(self, module: torch.nn.Module, device: torch.device) -> None:
        """Move the module like `module.to(device)`; parameters without values stay without memory."""
        for parameter in self._places:
            parameter.data = _no_memory(parameter, parameter.dtype, device)
        module.to(device)


CONVERTED = "its tensors are stored in another form"


def load_unread(config: ModelConfig) -> tuple[torch.nn.Module, UnreadWeights] | str:
    """The model as from `load_causal_lm`, on the CPU, without the values of its parameters; buffers have theirs.

    A sentence instead: why this model has to be loaded whole.

    Raises:
        UserError: like `load_causal_lm`; also for a tensor that is missing or has another shape.
    """
    shape = read_config(config.path, trust_remote_code=config.trust_remote_code)
    folder = weights_folder(resolve_builtin(config.path))
    tensors = stored_tensors(folder)
    reason = _unusual(shape, folder, tensors)
    if reason is not None:
        return f"{config.path}: every worker loads the whole model first ({reason})"
    module = _without_weights(shape, config, "model.path")
    found = matched(module, tensors, folder, "model.path")
    if isinstance(found, str):
        return f"{config.path}: every worker loads the whole model first ({found})"
    if module.can_generate():
        module.generation_config = _generation_config(str(folder))
    unread = UnreadWeights(_emptied(module, found, options_of(config, shape)["dtype"]))
    for name, buffer in module.named_buffers():
        if name in found:
            whole = torch.empty(buffer.shape, dtype=buffer.dtype)
            unread.bytes_read += found[name].read(whole.view(-1), 0)
            buffer.copy_(whole)
    return ready(module, config), unread


def check_stored(shape: Any, folder: Path, config: ModelConfig, option: str) -> None:
    """Check that the files have every tensor of the model, by their headers. `shape`: from `read_config`.

    Raises:
        UserError: a file or tensor is missing, or a tensor has another shape or is no weight; names `option`.
    """
    tensors = stored_tensors(folder, option)
    if _unusual(shape, folder, tensors) is None:
        matched(_without_weights(shape, config, option), tensors, folder, option)


def unusual_kind(shape: Any) -> str | None:
    """Why transformers alone can load a model of this configuration, whatever its files."""
    if getattr(shape, "quantization_config", None) is not None:
        return "its weights are quantised"
    if getattr(shape, "auto_map", None):
        return "it comes with its own code"
    return None


def _unusual(shape: Any, folder: Path, tensors: Mapping[str, StoredTensor]) -> str | None:
    """What of this model transformers alone can load."""
    reason = unusual_kind(shape)
    if reason is not None:
        return reason
    if (folder / "adapter_config.json").is_file():
        return "it has an adapter"
    if not tensors or getattr(shape, "transformers_weights", None) or getattr(type(shape), "extra_files", None):
        return "its files have names of their own"
    return None


def _without_weights(shape: Any, config: ModelConfig, option: str) -> Any:
    """The model with parameters on the meta device and buffers on the CPU; draws no random number."""
    import accelerate
    import transformers

    on_meta = accelerate.init_empty_weights(include_buffers=False)
    with does_not_load(config.path, option), torch.random.fork_rng(devices=[]), on_meta:
        module: Any = transformers.AutoModelForCausalLM.from_config(shape, **options_of(config, shape))
    module.tie_weights()  # registering a parameter anew has untied it
    return module


def _generation_config(path: str) -> Any:
    from transformers import GenerationConfig

    from ofmu_ray.internals.transformers_private import FROM_MODEL

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # as transformers does for a model without generation_config.json
        return GenerationConfig.from_pretrained(path, config_file_name="config.json", **{FROM_MODEL: True})


def matched(
    module: Any, tensors: Mapping[str, StoredTensor], folder: Path, option: str
) -> dict[str, StoredTensor] | str:
    """Parameter or buffer name -> its tensor; a tied parameter may be stored under any of its names.

    A sentence instead: why transformers has to load it.

    Raises:
        UserError: a parameter has no tensor, or one of another shape or of too few bits; names the file.
    """
    names = names_in_model(module, tensors)
    if names is None:
        return CONVERTED
    found = {name: tensors[key] for name, key in names.items()}
    groups: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter, []).append(name)
    for parameter, tied in groups.items():
        stored = [name for name in tied if name in found]
        if not stored:
            raise UserError(f"{option}: no file in {folder} has the tensor {tied[0]!r} of this model")
        if len(stored) > 1:
            return f"{stored[0]} and {stored[1]} are one parameter, and both are stored"
        entry = found[stored[0]]
        if entry.shape != tuple(parameter.shape):
            raise UserError(
                f"{option}: {entry.file} has {entry.name!r} of shape {list(entry.shape)}, but config.json asks for "
                f"{list(parameter.shape)}"
            )
        if parameter.is_floating_point() and not entry.trainable:
            raise UserError(
                f"{option}: {entry.file} has {entry.name!r} as {entry.dtype}, and config.json no way to read that: "
                "give a copy of the model in fp32, bf16 or fp16"
            )
        found |= dict.fromkeys(tied, entry)
    return found


def _emptied(module: torch.nn.Module, found: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[Any, StoredTensor]:
    """Replace the parameters on the meta device by parameters without memory on the CPU."""
    new: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    places: dict[torch.nn.Parameter, StoredTensor] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if old not in new:
            kept = dtype if old.is_floating_point() else old.dtype
            new[old] = torch.nn.Parameter(_no_memory(old, kept, torch.device("cpu")), requires_grad=old.requires_grad)
            new[old].__dict__.update(old.__dict__)
            places[new[old]] = found[name]
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, new[old])
    return places


def _no_memory(like: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype, device=device).expand(like.shape)
