"""An encoded stream on disk, and which of its rows a run uses. Of long streams, only the dropped rows are in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ofmu_ray.data.order import HELD_ROWS
from ofmu_ray.data.tokenise import take_rows


@dataclass(frozen=True)
class StoredStream:
    """An encoded stream on disk."""

    name: str
    folder: str
    """Folder of the Parquet parts."""
    parts: tuple[tuple[str, int], ...]
    """(file name, rows) of each part, in order."""

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(rows for _, rows in self.parts)


@dataclass(frozen=True)
class TokenisedStream(StoredStream):
    """A stream without the rows that the run drops; the others are numbered from 0 in the order of the parts."""

    dropped: np.ndarray
    """int64 [dropped rows], ascending indices over all parts: duplicates and overlap."""
    tokens: int
    """Of all used rows."""
    longest: int
    """Tokens of the longest used row."""
    fingerprint: str
    """Digest of content, format and used rows."""

    @property
    def used_rows(self) -> int:
        """Rows that the run uses."""
        return self.rows - len(self.dropped)

    def rows_at(self, at: np.ndarray) -> np.ndarray:
        """Indices over all parts of the used rows with these numbers: int32 (int64 where needed), shaped like `at`."""
        skipped = np.searchsorted(self.dropped - np.arange(len(self.dropped)), at, side="right")
        rows: np.ndarray = (at + skipped).astype(np.int32 if self.rows < 2**31 else np.int64)
        return rows

    def all_rows(self) -> np.ndarray:
        """Indices over all parts of all used rows. For streams that fit the memory."""
        return self.rows_at(np.arange(self.used_rows))

    def lengths_at(self, at: np.ndarray) -> np.ndarray:
        """Tokens of the used rows with these numbers, int32, shaped like `at`. A long stream is read for each call."""
        if self.used_rows <= HELD_ROWS:
            held: np.ndarray = self._all_lengths[at]
            return held
        numbers, inverse = np.unique(at, return_inverse=True)
        read: np.ndarray = self._lengths(numbers)[inverse].reshape(at.shape)
        return read

    def spread(self, most: int) -> np.ndarray:
        """Indices over all parts of at most `most` used rows, evenly spread."""
        last, count = self.used_rows - 1, min(most, self.used_rows)
        return self.rows_at(np.unique(np.linspace(0, last, count).round().astype(np.int64)))

    @functools.cached_property
    def _all_lengths(self) -> np.ndarray:
        return self._lengths(np.arange(self.used_rows))

    def _lengths(self, numbers: np.ndarray) -> np.ndarray:
        """`numbers`: ascending."""
        table = take_rows(self.folder, [part for part, _ in self.parts], self.rows_at(numbers), ["length"])
        lengths: np.ndarray = table["length"].to_numpy()
        return lengths
