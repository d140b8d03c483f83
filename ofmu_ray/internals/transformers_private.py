"""Private APIs of transformers: how the names in a checkpoint become those of a model, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ofmu_ray.internals.contract import Private, check_attributes

if TYPE_CHECKING:
    import torch

_NAMES = "finding a model's tensors in its files without loading the model"

MAPPING = Private("transformers.conversion_mapping", "get_model_conversion_mapping", _NAMES)
RENAME = Private("transformers.core_model_loading", "rename_source_key", _NAMES)
RENAMING = Private("transformers.core_model_loading", "WeightRenaming", _NAMES)
CONVERTER = Private("transformers.core_model_loading", "WeightConverter", _NAMES)
UNTIED = Private(
    "transformers.modeling_utils", "remove_tied_weights_from_state_dict", "writing tied weights once, under one name"
)
REVERTED = Private(
    "transformers.core_model_loading", "revert_weight_conversion", "writing weights under the names of their files"
)
SUPPORTS_SDPA, SUPPORTS_FLASH = "_supports_sdpa", "_supports_flash_attn"
STATEFUL = "_is_stateful"
"""Attributes of a model's class."""
FROM_MODEL = "_from_model_config"
"""Argument of GenerationConfig.from_pretrained: reads the options in a model's config.json, as loading the model does.

The public `from_model_config` writes two more entries into an export's generation_config.json.
"""


def supports_sdpa(model_class: type) -> bool:
    """Whether an architecture has the attention kernel `sdpa`."""
    check_attributes("transformers", model_class, [SUPPORTS_SDPA])
    return bool(getattr(model_class, SUPPORTS_SDPA))


def is_stateful(model: Any) -> bool:
    """Whether a model is recurrent, at least in some layers: its states cannot be cut back or left out."""
    check_attributes("transformers", model, [STATEFUL])
    return bool(getattr(model, STATEFUL))


def supports_flash(model_class: type) -> bool:
    """Whether an architecture has the attention kernel `flash_attention_2`."""
    check_attributes("transformers", model_class, [SUPPORTS_FLASH])
    return bool(getattr(model_class, SUPPORTS_FLASH))


def names_in_model(model: Any, stored: Iterable[str]) -> dict[str, str] | None:
    """Name in the model -> name in the files, for those of `stored` that the model has.

    None: some tensor needs more than another name (such as experts to be stacked).
    """
    state, prefix, rename = model.state_dict(), model.base_model_prefix, RENAME.get()
    mapping = MAPPING.get()(model)
    renamings = [entry for entry in mapping if isinstance(entry, RENAMING.get())]
    converters = [entry for entry in mapping if isinstance(entry, CONVERTER.get())]
    if len(renamings) + len(converters) < len(mapping):
        return None
    found = {}
    for key in stored:
        name, converted = rename(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converted = rename(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if converted is not None:
            return None
        if name in state:
            found[name] = key
    return found


def saved_names(model: Any, shapes: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
    """Name in the files that save_pretrained would write -> name in the state dict; None: it changes tensors, too.

    `shapes`: the state dict on the meta device, where tied names share a tensor.
    """
    import torch

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
