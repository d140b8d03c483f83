"""Private APIs of transformers: how the names in a checkpoint become those of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ofmu_ray.internals.contract import Private

_NAMES = "finding a model's tensors in its files without loading the model"

MAPPING = Private("transformers.conversion_mapping", "get_model_conversion_mapping", _NAMES)
RENAME = Private("transformers.core_model_loading", "rename_source_key", _NAMES)
RENAMING = Private("transformers.core_model_loading", "WeightRenaming", _NAMES)
CONVERTER = Private("transformers.core_model_loading", "WeightConverter", _NAMES)


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
