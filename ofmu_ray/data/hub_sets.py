"""Data sets of the library `datasets`: from the hub, or a folder of save_to_disk."""

from __future__ import annotations

import os
from typing import Any

from ofmu_ray.config import SourceConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage.hub import unreachable


def hub_set(source: SourceConfig, option: str) -> Any:
    """The data set that a source names on the hub. Raises UserError: no connection, no such data set."""
    name = str(source.path)
    reason = None if os.path.exists(name) else unreachable(name, "dataset")
    asked = f"{option}.hub_config = {source.hub_config}, {option}.hub_split = {source.hub_split}"
    if reason is not None:
        raise UserError(f"{option}.path = {name}: neither a file or folder here nor a hub data set ({asked}): {reason}")
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, source.hub_config, split=source.hub_split)
    except Exception as error:  # the hub client raises many types of errors: network, names, configurations, splits
        raise UserError(
            f"{option}.path = {name}: neither a file or folder here nor a hub data set that can be loaded "
            f"({type(error).__name__}) with {asked}; check the names, the network or the offline cache"
        ) from None


def saved_set(folder: str, source: SourceConfig, option: str) -> Any:
    """The split of a source in a folder of save_to_disk. Raises UserError: it cannot be read, or has no such split."""
    import datasets

    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:  # a damaged folder raises many types of errors
        reason = f"a folder of datasets' save_to_disk that cannot be read ({type(error).__name__})"
        raise UserError(f"{option}.path = {source.shown}: {reason}") from None
    if isinstance(saved, datasets.DatasetDict):
        if source.hub_split not in saved:
            splits = ", ".join(map(str, saved))
            raise UserError(
                f"{option}.hub_split = {source.hub_split!r}: {source.shown} has no such split, only {splits}"
            )
        saved = saved[source.hub_split]
    return saved
