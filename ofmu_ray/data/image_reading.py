"""The pixels of a plan's rows: a plan names rows, and whoever reads it takes their pixels from a memory-mapped table.

So a plan of many epochs stays small. Crops and flips happen here, too: in Ray Data's tasks, or in the process of a
single worker. They depend on seed, row and round only, not on batches or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from ofmu_ray.data.batch_plan import Plan
from ofmu_ray.data.sidecar import StoredValues, has_table, new_table
from ofmu_ray.data.stored_stream import TokenisedStream
from ofmu_ray.data.tokenise import take_rows
from ofmu_ray.storage import join

ROWS_AT_ONCE = 4096
_opened = lru_cache(maxsize=16)(StoredValues)


def pixel_table(stream: TokenisedStream, shape: tuple[int, int, int]) -> str:
    """Folder of the stream's pixels by row id, uint8 [rows, height, width, channels]; written beside its parts."""
    folder = join(stream.folder, "pixels")
    if has_table(folder):
        return folder
    parts = [name for name, _ in stream.parts]
    rows = np.arange(stream.rows)
    ids = take_rows(stream.folder, parts, rows, ["row_id"])["row_id"].to_pylist()
    ones = np.ones(len(ids), dtype=np.int64)
    with new_table(folder, ids, ones, shape, "uint8", {"quantity": "pixels"}) as (values, _):
        at = 0
        for name, count in stream.parts:
            column = take_rows(stream.folder, [name], np.arange(count), ["image_pixels"])["image_pixels"]
            for chunk in column.chunks:
                pixels = np.frombuffer(b"".join(chunk.to_pylist()), dtype=np.uint8)
                values[at : at + len(chunk)] = pixels.reshape(len(chunk), *shape)
                at += len(chunk)
    return folder


@dataclass(frozen=True)
class ImageReading:
    """Adds the column `pixels` to the rows of a plan."""

    tables: Mapping[str, str]
    """Stream -> folder of `pixel_table`."""
    padding: int
    """0: no crops."""
    flip: bool
    seed: int

    def __call__(self, table: pa.Table, plan: Plan) -> pa.Table:
        """`table`: position, row_id and what else the plan has, in the order of a shard."""
        positions = table["position"].to_numpy()
        ids = table["row_id"].to_pylist()
        rounds, offsets = np.divmod(positions, plan.rows_per_round)
        ends = np.cumsum([plan.batches_per_round[name] * plan.share for name in plan.streams])
        places = np.searchsorted(ends, offsets, side="right")
        pixels: np.ndarray | None = None
        for number, stream in enumerate(plan.streams):
            chosen = np.flatnonzero(places == number)
            if not len(chosen):
                continue
            values = _opened(self.tables[stream]).rows([ids[row] for row in chosen]).numpy()
            if pixels is None:
                pixels = np.empty((len(ids), *values.shape[1:]), dtype=np.uint8)
            pixels[chosen] = values
        assert pixels is not None
        pixels = augmented(pixels, draws(ids, rounds, self.seed), padding=self.padding, flip=self.flip)
        size = int(np.prod(pixels.shape[1:]))
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(ids), [None, pa.py_buffer(pixels)])
        return table.append_column("image_pixels", column)


def draws(ids: list[str], rounds: np.ndarray, seed: int) -> np.ndarray:
    """Random bits of each row in its round, uint64 [rows]."""
    names = (f"{seed}/{name}/{number}".encode() for name, number in zip(ids, rounds.tolist(), strict=True))
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8")


def augmented(pixels: np.ndarray, bits: np.ndarray, *, padding: int, flip: bool) -> np.ndarray:
    """Random crops of the images padded with black, and flips of half of them; uint8 [rows, height, width, channels].

    (torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, with draws from `bits`, uint64 [rows].)
    """
    rows, height, width, _ = pixels.shape
    if padding:
        reach = np.uint64(2 * padding + 1)
        down, right = (bits % reach).astype(np.int64), ((bits >> np.uint64(20)) % reach).astype(np.int64)
        wide = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        y, x = down[:, None] + np.arange(height), right[:, None] + np.arange(width)
        pixels = wide[np.arange(rows)[:, None, None], y[:, :, None], x[:, None, :]]
    if flip:
        turned = (bits >> np.uint64(40)) % np.uint64(2) == 1
        pixels = np.where(turned[:, None, None, None], pixels[:, :, ::-1], pixels)
    return np.ascontiguousarray(pixels)
