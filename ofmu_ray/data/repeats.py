"""Duplicates and overlap of encoded streams: tasks compare digests and return the rows that match.

Texts are compared in buckets by the first bytes of their digests, so no process holds the digests of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ofmu_ray.cluster.map_tasks import running_ray
from ofmu_ray.data import row_checks as checks
from ofmu_ray.data.stored_stream import StoredStream
from ofmu_ray.data.tokenise import DIGEST, read_part

BUCKET_ROWS = 250_000
"""Rows of all streams for which one bucket is enough; this process compares them. More buckets are tasks on Ray."""


@dataclass(frozen=True)
class Matches:
    """Rows of a stream, ascending, int64: equal to an earlier one, or (of `retain`) to one of `forget`."""

    exact: np.ndarray
    normalised: np.ndarray
    """After normalising; includes the exact ones."""
    shared_exact: np.ndarray
    shared: np.ndarray
    """After normalising."""


@dataclass(frozen=True)
class _Texts:
    exact: np.ndarray
    """S16 [texts]."""
    normalised: np.ndarray
    row: np.ndarray
    """int64 [texts]; a row holds several texts if documents are packed."""


def find_matches(streams: Sequence[StoredStream]) -> dict[str, Matches]:
    """The rows that occur more than once, by stream."""
    buckets = max(1, -(-sum(stream.rows for stream in streams) // BUCKET_ROWS))
    if buckets > 1 and running_ray() is not None:
        from ofmu_ray.data.ray_data import run_tasks

        results = run_tasks(_bucket, [(number, buckets) for number in range(buckets)], list(streams), "comparing")
    else:
        results = [_bucket((number, buckets), streams) for number in range(buckets)]
    return {
        stream.name: Matches(
            *(np.unique(np.concatenate(rows)) for rows in zip(*(found[stream.name] for found in results), strict=True))
        )
        for stream in streams
    }


def _bucket(job: tuple[int, int], streams: Sequence[StoredStream]) -> dict[str, tuple[np.ndarray, ...]]:
    """The rows of `Matches` by stream, of one bucket's texts."""
    texts = {stream.name: _texts(stream, *job) for stream in streams}
    none = np.empty(0, dtype=np.int64)
    found: dict[str, tuple[np.ndarray, ...]] = {}
    for name, own in texts.items():
        again = checks.repeats(own.exact, own.normalised)
        shared_exact = shared = none
        if name == "retain" and "forget" in texts:
            shared_exact = own.row[np.isin(own.exact, texts["forget"].exact)]
            shared = own.row[np.isin(own.normalised, texts["forget"].normalised)]
        found[name] = (own.row[again.exact], own.row[again.normalised], shared_exact, shared)
    return found


def _texts(stream: StoredStream, number: int, buckets: int) -> _Texts:
    """The texts of a stream whose normalised digest falls into the bucket, in order."""
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    first = 0
    for name, rows in stream.parts:
        table = read_part(stream.folder, name, ["exact", "normalised"])
        counts, normalised = digests_of(table["normalised"])
        exact = digests_of(table["exact"])[1]
        mine = normalised.view(np.uint64)[:: DIGEST // 8] % buckets == number
        row = np.repeat(np.arange(first, first + rows), counts)
        kept.append((exact[mine], normalised[mine], row[mine]))
        first += rows
    empty = np.empty(0, dtype=f"S{DIGEST}")
    kept = kept or [(empty, empty, np.empty(0, dtype=np.int64))]
    return _Texts(*(np.concatenate(column) for column in zip(*kept, strict=True)))


def digests_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(digests per row [rows], all digests S16 [texts]) of a column of digests, which has no nulls."""
    counts, pieces = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=f"S{DIGEST}")]
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if len(chunk):
            counts.append(np.diff(bounds).astype(np.int64) // DIGEST)
            whole = np.frombuffer(data or b"", dtype=np.uint8)[bounds[0] : bounds[-1]]
            pieces.append(whole.view(f"S{DIGEST}"))
    return np.concatenate(counts), np.concatenate(pieces)
