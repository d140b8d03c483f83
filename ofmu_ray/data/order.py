"""Which row goes into which slot of which batch: pure numpy, determined by the seed alone.

A stream is an endless sequence of epochs; each epoch is a permutation of the rows, so every row occurs exactly once per
epoch. Within an epoch, windows of `WINDOW_BATCHES` batches are sorted by length, cut into batches, and the batches
shuffled: a batch has rows of similar length (less padding), and the order of batches is random.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

WINDOW_BATCHES = 16
HELD_ROWS = 2**20
"""A longer stream's order and lengths are not held in memory."""
_FEISTEL_ROUNDS = 6


def batch_order(
    rows: int,
    batches: int,
    batch_size: int,
    *,
    lengths: Callable[[np.ndarray], np.ndarray],
    seed: int,
    stream: str,
) -> np.ndarray:
    """int64 [batches, batch_size]: number of the row in each slot. Memory grows with the slots, not with the rows.

    Positions k*n to (k+1)*n of the flattened result are a permutation of the n rows. A batch repeats rows only if the
    stream has fewer rows than a batch, and then as evenly as possible. More batches extend the sequence without
    changing its start; it does not depend on the number of workers. `lengths`: tokens of the rows with these numbers.
    """
    need = batches * batch_size
    order = np.empty(need, dtype=np.int64)
    at, open_batch = 0, np.empty(0, dtype=np.int64)  # rows of the unfinished batch from the last epoch
    for epoch in itertools.count():
        rng = np.random.default_rng(_entropy(seed, stream, epoch))
        shuffled = _shuffled(rows, rng)
        first = shuffled(0, min(rows, batch_size))
        head, left = _complete(open_batch, first, -len(open_batch) % batch_size)
        rest = _Joined(left, shuffled, len(first), rows)
        full = rest.size // batch_size * batch_size
        wanted = min(full, _whole_windows(need - at - len(head), batch_size))
        windows = _windows(rest(0, wanted), lengths, batch_size, rng)
        last = rest(full, rest.size)
        for piece in itertools.chain([head], windows, [last]):
            take = min(len(piece), need - at)
            order[at : at + take] = piece[:take]
            at += take
            if at == need:
                return order.reshape(batches, batch_size)
        unfinished = np.concatenate([open_batch, head])
        open_batch = last if rest.size else unfinished[len(unfinished) // batch_size * batch_size :]
    raise AssertionError("epochs are endless")


def shard_slots(lengths: np.ndarray, workers: int) -> np.ndarray:
    """int64 [batches, batch_size], slots of each batch by shard: columns w*share to (w+1)*share belong to shard w.

    `lengths` is int [batches, batch_size]. Slots are dealt in descending length in snake order (0, 1, 1, 0, 0, 1, ...),
    so shards get equal numbers of rows and nearly equal numbers of tokens.
    """
    batch_size = lengths.shape[1]
    longest_first = np.argsort(-lengths.astype(np.int64), axis=1, kind="stable")
    dealt = np.arange(batch_size).reshape(-1, workers)
    dealt[1::2] = dealt[1::2, ::-1]
    return longest_first[:, dealt.T.ravel()]


Slice = Callable[[int, int], np.ndarray]
"""Rows at these positions of an epoch."""


def _shuffled(rows: int, rng: np.random.Generator) -> Slice:
    """A permutation of the rows; above `HELD_ROWS` it is computed on demand."""
    if rows > HELD_ROWS:
        keys = rng.integers(2**64, size=_FEISTEL_ROUNDS, dtype=np.uint64)
        return lambda start, stop: _permuted(np.arange(start, stop, dtype=np.uint64), rows, keys)
    held = rng.permutation(np.arange(rows, dtype=np.int32))
    return lambda start, stop: held[start:stop]


def _permuted(at: np.ndarray, rows: int, keys: np.ndarray) -> np.ndarray:
    """Values of a permutation of range(rows), int64, at uint64 `at`.

    A Feistel network permutes the next power of four; what it puts beyond the rows goes through it again (cycle
    walking: Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9).
    """
    half = np.uint64(-(-(rows - 1).bit_length() // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = at.copy()
    outside = np.arange(len(at))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        values[outside] = left << half | right
        outside = outside[values[outside] >= rows]
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ values >> np.uint64(31)
    return mixed


@dataclass(frozen=True)
class _Joined:
    """What is left of an epoch's first `skipped` rows, and then its others."""

    left: np.ndarray
    others: Slice
    skipped: int
    rows: int

    @property
    def size(self) -> int:
        return len(self.left) + self.rows - self.skipped

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Rows at these positions."""
        shift = self.skipped - len(self.left)
        others = self.others(max(start + shift, self.skipped), max(stop + shift, self.skipped))
        return np.concatenate([self.left[start:stop], others])


def _complete(open_batch: np.ndarray, first: np.ndarray, missing: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that complete an unfinished batch, preferring rows that are not in it yet, and the other ones.

    `first`: an epoch's first rows, as many as a batch has; more need not be looked at.
    """
    if not missing:
        return first[:0], first
    counts = (first[:, None] == open_batch).sum(axis=1)
    chosen = np.argsort(counts, kind="stable")[:missing]
    rest = np.ones(len(first), dtype=bool)
    rest[chosen] = False
    return first[chosen], first[rest]


def _whole_windows(slots: int, batch_size: int) -> int:
    """The slots, up to the end of their last window."""
    window = WINDOW_BATCHES * batch_size
    return -(-max(slots, 0) // window) * window


def _windows(
    rows: np.ndarray, lengths: Callable[[np.ndarray], np.ndarray], batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    window, tokens = WINDOW_BATCHES * batch_size, lengths(rows)
    for start in range(0, len(rows), window):
        some, by_length = rows[start : start + window], np.argsort(tokens[start : start + window], kind="stable")
        batches = some[by_length].reshape(-1, batch_size)
        yield batches[rng.permutation(len(batches))].ravel()


def _entropy(seed: int, stream: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{epoch}".encode()).digest()[:16], "big")
