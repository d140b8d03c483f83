"""The tensors of a model's safetensors files, read in parts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ofmu_ray.errors import UserError

PIECE = 16 * 2**20
"""Bytes that are read at a time, or one row if that is more."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, F8_E4M3, I8 and so on."""

    @property
    def trainable(self) -> bool:
        """Whether its values are weights: 8 bits and fewer mean nothing without their scales."""
        return self.dtype in ("F64", "F32", "BF16", "F16")

    @property
    def bytes_per_element(self) -> int:
        return _bytes(self.dtype)

    def read(self, target: torch.Tensor, start: int) -> int:
        """Copy the elements from `start` of the flattened tensor into the 1-D `target`; returns the bytes read.

        The dtype is converted. Only the pages that hold these elements are touched, and after each piece the file is
        unmapped: mapped pages count as resident memory.
        """
        row = math.prod(self.shape[1:])
        step = row * max(1, PIECE // max(1, row * self.bytes_per_element))
        for at in range(0, target.numel(), step or 1):
            self._read_piece(target[at : at + step], start + at)
        return target.numel() * self.bytes_per_element

    def _read_piece(self, target: torch.Tensor, start: int) -> None:
        from safetensors import safe_open

        first, last = rows(self.shape, start, start + target.numel())
        with safe_open(self.file, framework="pt") as weights:
            part = weights.get_slice(self.name)[first:last] if self.shape else weights.get_tensor(self.name)
        skipped = start - first * math.prod(self.shape[1:])
        with torch.no_grad():
            target.copy_(part.reshape(-1)[skipped : skipped + target.numel()])


def rows(shape: Sequence[int], start: int, stop: int) -> tuple[int, int]:
    """The rows of a tensor's first dimension (first, past the last) with its flat elements `start` to `stop`."""
    size = math.prod(shape[1:])
    return start // size, -(-stop // size)


def share(numel: int, rank: int, world: int) -> tuple[int, int]:
    """The elements (first, past the last) of a flattened parameter that a ZeRO-3 rank keeps."""
    size = -(-numel // world)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def stored_tensors(folder: Path, option: str = "model.path") -> dict[str, StoredTensor]:
    """The tensors of a model directory by their names in the files; {} if its files have names of their own.

    Raises:
        UserError: the index cannot be read, a file that it names is missing or damaged, or lacks a tensor.
    """
    if (folder / _SINGLE).is_file():
        return _tensors_of(folder / _SINGLE, option)
    if not (folder / _INDEX).is_file():
        return {}
    where = _weight_map(folder / _INDEX, option)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(where.values())):
        if not (folder / name).is_file():
            raise UserError(f"{option}: {folder / _INDEX} names {name}, which is not in the folder: copy it there too")
        found |= _tensors_of(folder / name, option)
    for tensor, name in where.items():
        if tensor not in found:
            raise UserError(f"{option}: {folder / name} has no tensor {tensor!r}, which {_INDEX} says it has")
    return found


def _weight_map(index: Path, option: str) -> dict[str, str]:
    try:
        where = json.loads(index.read_text())["weight_map"]
        return {str(tensor): str(name) for tensor, name in where.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{option}: {index} is not an index of safetensors files ({error!r})") from None


def _tensors_of(file: Path, option: str) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            found = {}
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                part = weights.get_slice(name)
                found[name] = StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
            return found
    except (SafetensorError, OSError) as error:
        raise UserError(f"{option}: {file} is not a readable safetensors file ({error})") from None


def _bytes(dtype: str) -> int:
    """Bytes of one element: BF16 has 16 bits, F8_E4M3 eight; BOOL has a byte."""
    digits = "".join(character for character in dtype.partition("_")[0] if character.isdigit())
    return max(1, int(digits or 8) // 8)
