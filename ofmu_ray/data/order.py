"""Which row goes into which slot of which batch: pure numpy, determined by the seed alone.

A stream is an endless sequence of epochs; each epoch is a permutation of the rows, so every row occurs exactly once per
epoch. Within an epoch, windows of `WINDOW_BATCHES` batches are sorted by length, cut into batches, and the batches
shuffled: a batch has rows of similar length (less padding), and the order of batches is random.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

WINDOW_BATCHES = 16


def batch_order(lengths: np.ndarray, batches: int, batch_size: int, *, seed: int, stream: str) -> np.ndarray:
    """int64 [batches, batch_size]: index of the row in each slot.

    Positions k*n to (k+1)*n of the flattened result are a permutation of the n rows. A batch repeats rows only if the
    stream has fewer rows than a batch, and then as evenly as possible. More batches extend the sequence without
    changing its start; it does not depend on the number of workers.
    """
    need = batches * batch_size
    order = np.empty(need, dtype=np.int64)
    at = 0
    for piece in _pieces(lengths, batch_size, seed, stream):
        take = min(len(piece), need - at)
        order[at : at + take] = piece[:take]
        at += take
        if at == need:
            return order.reshape(batches, batch_size)
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


def _pieces(lengths: np.ndarray, batch_size: int, seed: int, stream: str) -> Iterator[np.ndarray]:
    """The epochs, piece by piece: a plan may need a small part of one."""
    rows = len(lengths)
    open_batch = np.empty(0, dtype=np.int64)  # rows of the unfinished batch from the last epoch
    for epoch in itertools.count():
        rng = np.random.default_rng(_entropy(seed, stream, epoch))
        shuffled = rng.permutation(np.arange(rows, dtype=np.int32 if rows < 2**31 else np.int64))  # half the memory
        head, rest = _complete(open_batch, shuffled, -len(open_batch) % batch_size)
        full = len(rest) // batch_size * batch_size
        yield head
        yield from _windows(rest[:full], lengths, batch_size, rng)
        yield rest[full:]
        unfinished = np.concatenate([open_batch, head])
        open_batch = rest[full:] if len(rest) else unfinished[len(unfinished) // batch_size * batch_size :]


def _complete(open_batch: np.ndarray, shuffled: np.ndarray, missing: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that complete an unfinished batch, preferring rows that are not in it yet, and the other rows."""
    if not missing:
        return shuffled[:0], shuffled
    counts = np.bincount(open_batch, minlength=len(shuffled))
    chosen = np.argsort(counts[shuffled], kind="stable")[:missing]
    rest = np.ones(len(shuffled), dtype=bool)
    rest[chosen] = False
    return shuffled[chosen], shuffled[rest]


def _windows(
    shuffled: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    window = WINDOW_BATCHES * batch_size
    for start in range(0, len(shuffled), window):
        rows = shuffled[start : start + window]
        batches = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, batch_size)
        yield batches[rng.permutation(len(batches))].ravel()


def _entropy(seed: int, stream: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{epoch}".encode()).digest()[:16], "big")
