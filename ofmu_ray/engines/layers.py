"""The output of one decoder layer, without running what lies above it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ofmu_ray.errors import UserError
from ofmu_ray.models.answers import logits_at, unwrapped

DEFAULT_LAYER = 7
"""Layer whose output RMU steers unless told otherwise (OpenUnlearning's rmu.yaml)."""


def chosen_layer(wanted: int | None, layers: int) -> int:
    """The layer's number, from 0: `wanted`, or 7, or the middle one of a model with fewer than 8 layers.

    Raises UserError when the model has no such layer.
    """
    if wanted is not None and wanted >= layers:
        raise UserError(f"rmu.layer = {wanted}: the model has layers 0 to {layers - 1}")
    if wanted is not None:
        return wanted
    return DEFAULT_LAYER if layers > DEFAULT_LAYER else (layers - 1) // 2


def decoder_layers(module: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder's layers (of Llama, Qwen2, GPT-NeoX and others of transformers; adapters and wrappers allowed)."""
    parent, name = _place(module)
    layers = getattr(parent, name)
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


def _place(module: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The module that holds the layers, and under which name."""
    model = unwrapped(module)
    count = model.config.get_text_config().num_hidden_layers
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                return parent, name
    raise AssertionError(f"{type(module).__name__} has no list of {count} layers")


def layer_output(module: torch.nn.Module, batch: Mapping[str, Any], layer: int) -> torch.Tensor:
    """What layer number `layer` (from 0) puts out, [rows, positions, width]; layers above it and the head do not run.

    `module` may be DeepSpeed's wrapper: the model's own forward runs, with a shorter list of layers, so that sharded
    weights are gathered as ever. `batch`: input_ids, attention_mask.
    """
    nowhere = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    with _up_to(module, layer) as outputs:
        logits_at(module, batch, nowhere)
    return outputs[0]


def parameters_up_to(module: torch.nn.Module, layer: int) -> list[torch.nn.Parameter]:
    """The parameters that `layer_output` needs: those of the modules that run until the layer is done."""
    found: dict[int, torch.nn.Parameter] = {}
    running = True

    def note(part: torch.nn.Module, _inputs: Any) -> None:
        if running:
            found.update({id(parameter): parameter for parameter in part.parameters(recurse=False)})

    def stop(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        nonlocal running
        running = False

    handles = [part.register_forward_pre_hook(note) for part in module.modules()]
    handles.append(decoder_layers(module)[layer].register_forward_hook(stop))
    try:
        two = torch.ones(1, 2, dtype=torch.long, device=next(module.parameters()).device)
        with torch.no_grad():
            layer_output(module, {"input_ids": two, "attention_mask": two}, layer)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


@contextmanager
def _up_to(module: torch.nn.Module, layer: int) -> Iterator[list[torch.Tensor]]:
    """Within the context the decoder ends after `layer`, whose outputs the yielded list collects."""
    parent, name = _place(module)
    layers = getattr(parent, name)
    outputs: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[layer].register_forward_hook(keep)
    setattr(parent, name, torch.nn.ModuleList(list(layers)[: layer + 1]))
    try:
        yield outputs
    finally:
        setattr(parent, name, layers)
        handle.remove()
