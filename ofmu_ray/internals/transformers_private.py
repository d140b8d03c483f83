"""What save_pretrained does with a state dict before it writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ofmu_ray.internals.contract import Private

UNTIED = Private(
    "transformers.modeling_utils", "remove_tied_weights_from_state_dict", "writing tied weights once, under one name"
)
REVERTED = Private(
    "transformers.core_model_loading", "revert_weight_conversion", "writing weights under the names of their files"
)


def saved_names(model: Any, shapes: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
    """Name in the files that save_pretrained would write -> name in the state dict; None: it changes tensors, too.

    `shapes`: the state dict on the meta device, where tied names share a tensor.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    places: dict[int, torch.Tensor] = {}  # the library finds ties by their storage, which meta tensors do not have
    stand_ins = {
        name: places.setdefault(id(shape), torch.empty(1)) for name, shape in shapes.items() if name not in ignored
    }
    untied = {name: shapes[name] for name in UNTIED.get()(stand_ins, model)}
    names = {id(shape): name for name, shape in untied.items()}
    assert len(names) == len(untied), "a tied weight would be written twice"
    try:
        converted = REVERTED.get()(model, dict(untied))
    except (RuntimeError, NotImplementedError):  # an operation that meta tensors do not have
        return None
    if any(id(value) not in names for value in converted.values()):
        return None
    return {name: names[id(value)] for name, value in converted.items()}
