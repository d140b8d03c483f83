"""The output of one decoder layer, without running the layers above it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ofmu_ray.models.answers import logits_at, unwrapped
from ofmu_ray.models.stored_names import check_layer

DEFAULT_LAYER = 7
"""RMU's default layer (OpenUnlearning's rmu.yaml)."""


def chosen_layer(wanted: int | None, layers: int, option: str = "rmu.layer") -> int:
    """The layer's number, from 0: `wanted`, else 7, or the middle layer of a model with fewer than 8 layers.

    Raises UserError if the model has no such layer.
    """
    if wanted is not None:
        check_layer(wanted, layers, option)
        return wanted
    return DEFAULT_LAYER if layers > DEFAULT_LAYER else (layers - 1) // 2


def decoder_layers(module: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder's layers (Llama, Qwen2, GPT-NeoX and others of transformers; adapters and wrappers allowed)."""
    parent, name = _place(module)
    layers = getattr(parent, name)
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


def _place(module: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The parent module of the layers, and their name in it."""
    model = unwrapped(module)
    count = model.config.get_text_config().num_hidden_layers
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                return parent, name
    raise AssertionError(f"{type(module).__name__} has no list of {count} layers")


def layer_output(module: torch.nn.Module, batch: Mapping[str, Any], layer: int) -> torch.Tensor:
    """Output of layer `layer` (from 0), [rows, positions, width]; the layers above it and the head do not run.

    `module` may be DeepSpeed's wrapper: the model's forward runs with a shorter list of layers, so sharded weights are
    gathered as usual. `batch`: input_ids, attention_mask.
    """
    no_positions = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    with _up_to(module, layer) as outputs:
        logits_at(module, batch, no_positions)
    return outputs[0]


def parameters_up_to(module: torch.nn.Module, layer: int) -> list[torch.nn.Parameter]:
    """The parameters that `layer_output` needs: those of all modules that run up to the end of the layer."""
    parameters: dict[int, torch.nn.Parameter] = {}
    running = True

    def note(part: torch.nn.Module, _inputs: Any) -> None:
        if running:
            parameters.update({id(parameter): parameter for parameter in part.parameters(recurse=False)})

    def stop(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        nonlocal running
        running = False

    handles = [part.register_forward_pre_hook(note) for part in module.modules()]
    handles.append(decoder_layers(module)[layer].register_forward_hook(stop))
    try:
        device = next(module.parameters()).device
        two = torch.ones(1, 2, dtype=torch.long, device=device)
        # a skeleton on the meta device has no values: transformers reads those of any mask but one of four dimensions
        mask = torch.zeros(1, 1, 2, 2, device=device)
        with torch.no_grad(), _up_to(module, layer):
            unwrapped(module).base_model(input_ids=two, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return list(parameters.values())


@contextmanager
def _up_to(module: torch.nn.Module, layer: int) -> Iterator[list[torch.Tensor]]:
    """Within the context the decoder ends after `layer`; the yielded list collects its outputs."""
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
