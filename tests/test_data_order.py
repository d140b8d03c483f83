"""The plan's order: pure numpy, so its guarantees are checked over random shapes, held in memory or computed."""

import tracemalloc
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from ofmu_ray.data.order import _FEISTEL_ROUNDS, _permuted, batch_order, shard_slots

shapes = {
    "rows": st.integers(1, 70),
    "batches": st.integers(1, 40),
    "share": st.integers(1, 4),
    "workers": st.integers(1, 4),
    "seed": st.integers(-3, 9),
    "held": st.booleans(),
}


def lengths_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(5, 200, rows)


def ordered(lengths: np.ndarray, batches: int, size: int, seed: int, held: bool, stream: str = "forget") -> np.ndarray:
    with patch("ofmu_ray.data.order.HELD_ROWS", len(lengths) if held else 0):
        return batch_order(len(lengths), batches, size, lengths=lengths.__getitem__, seed=seed, stream=stream)


@settings(max_examples=150)
@given(**shapes)
def test_each_row_once_per_cycle(rows: int, batches: int, share: int, workers: int, seed: int, held: bool) -> None:
    size = share * workers
    order = ordered(lengths_of(rows), batches, size, seed, held)
    assert order.shape == (batches, size)
    flat = order.ravel()
    for start in range(0, len(flat) - rows + 1, rows):
        assert sorted(flat[start : start + rows]) == list(range(rows))
    rest = flat[len(flat) // rows * rows :]
    assert len(set(rest)) == len(rest)


@settings(max_examples=150)
@given(**shapes)
def test_a_row_repeats_in_a_batch_only_when_unavoidable(
    rows: int, batches: int, share: int, workers: int, seed: int, held: bool
) -> None:
    size = share * workers
    order = ordered(lengths_of(rows), batches, size, seed, held)
    most = max(max(Counter(batch).values()) for batch in order.tolist())
    # ceil(size / rows) is the floor; an epoch that ends inside the batch can force one more where rows < size
    assert most <= -(-size // rows) + (1 if rows < size else 0)


@settings(max_examples=60)
@given(**shapes)
def test_order_is_deterministic_and_extends(
    rows: int, batches: int, share: int, workers: int, seed: int, held: bool
) -> None:
    size, lengths = share * workers, lengths_of(rows)
    order = ordered(lengths, batches, size, seed, held)
    longer = ordered(lengths, batches + 7, size, seed, held)
    assert np.array_equal(longer[:batches], order)


@settings(max_examples=100)
@given(**shapes)
def test_shards_partition_a_batch_evenly(
    rows: int, batches: int, share: int, workers: int, seed: int, held: bool
) -> None:
    size, lengths = share * workers, lengths_of(rows)
    order = ordered(lengths, batches, size, seed, held)
    slots = shard_slots(lengths[order], workers)
    assert np.array_equal(np.sort(slots, axis=1), np.broadcast_to(np.arange(size), slots.shape))
    tokens = np.take_along_axis(lengths[order], slots, axis=1).reshape(batches, workers, share)
    spread = tokens.sum(axis=2).max(axis=1) - tokens.sum(axis=2).min(axis=1)
    assert (spread <= tokens.max(axis=(1, 2))).all()  # snake order: shards differ by less than one row
    assert (np.diff(tokens, axis=2) <= 0).all()  # longest first, so micro-batches hold rows of like length


@pytest.mark.parametrize("held", [True, False])
def test_seeds_and_streams_and_epochs_differ(held: bool) -> None:
    lengths = lengths_of(64)
    first = ordered(lengths, 16, 8, 0, held)
    assert not np.array_equal(first, ordered(lengths, 16, 8, 1, held))
    assert not np.array_equal(first, ordered(lengths, 16, 8, 0, held, stream="retain"))
    assert not np.array_equal(first[:8], first[8:])


@pytest.mark.parametrize("held", [True, False])
def test_bucketing_saves_padding_and_batches_stay_shuffled(held: bool) -> None:
    lengths = lengths_of(2000)
    order = ordered(lengths, 250, 8, 0, held, stream="retain")
    plain = np.random.default_rng(0).permutation(2000).reshape(250, 8)

    def padding(batches: np.ndarray) -> int:
        batch_lengths = lengths[batches]
        return int((batch_lengths.max(axis=1, keepdims=True) - batch_lengths).sum())

    assert padding(order) < 0.25 * padding(plain)
    mean = lengths[order].mean(axis=1)
    assert abs(np.corrcoef(np.arange(250), mean)[0, 1]) < 0.2


def test_a_computed_order_is_uniform() -> None:
    """Over 2,000 seeds every row comes first about equally often, and neighbours are independent."""
    rows, seeds = 20, 2000
    firsts = np.stack([_permuted(np.arange(2, dtype=np.uint64), rows, keys_of(seed)) for seed in range(seeds)])
    counts = np.bincount(firsts[:, 0] * rows + firsts[:, 1], minlength=rows * rows).reshape(rows, rows)
    assert not counts.diagonal().any()
    others = counts[~np.eye(rows, dtype=bool)]
    expected = seeds / len(others)
    assert chi2.sf(((others - expected) ** 2 / expected).sum(), len(others) - 1) > 1e-4


def keys_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2**64, size=_FEISTEL_ROUNDS, dtype=np.uint64)


def test_memory_does_not_grow_with_the_rows() -> None:
    rows = 10**12
    tracemalloc.start()
    order = batch_order(rows, 100, 8, lengths=lambda at: at % 97, seed=0, stream="retain")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(order)) == order.size
    assert order.max() < rows
    assert peak < 2**20
