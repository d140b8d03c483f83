"""The plan's order: pure numpy, so its guarantees are checked over random shapes."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ofmu_ray.data.order import batch_order, shard_slots

shapes = {
    "rows": st.integers(1, 70),
    "batches": st.integers(1, 40),
    "share": st.integers(1, 4),
    "workers": st.integers(1, 4),
    "seed": st.integers(-3, 9),
}


def lengths_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(5, 200, rows)


@settings(max_examples=150, deadline=None)
@given(**shapes)
def test_each_row_once_per_cycle(rows: int, batches: int, share: int, workers: int, seed: int) -> None:
    size = share * workers
    order = batch_order(lengths_of(rows), batches, size, seed=seed, stream="forget")
    assert order.shape == (batches, size)
    flat = order.ravel()
    for start in range(0, len(flat) - rows + 1, rows):
        assert sorted(flat[start : start + rows]) == list(range(rows))
    rest = flat[len(flat) // rows * rows :]
    assert len(set(rest)) == len(rest)


@settings(max_examples=150, deadline=None)
@given(**shapes)
def test_a_row_repeats_in_a_batch_only_when_unavoidable(
    rows: int, batches: int, share: int, workers: int, seed: int
) -> None:
    size = share * workers
    order = batch_order(lengths_of(rows), batches, size, seed=seed, stream="forget")
    most = max(max(Counter(batch).values()) for batch in order.tolist())
    # ceil(size / rows) is the floor; an epoch that ends inside the batch can force one more where rows < size
    assert most <= -(-size // rows) + (1 if rows < size else 0)


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_order_is_deterministic_and_extends(rows: int, batches: int, share: int, workers: int, seed: int) -> None:
    size, lengths = share * workers, lengths_of(rows)
    order = batch_order(lengths, batches, size, seed=seed, stream="forget")
    longer = batch_order(lengths, batches + 7, size, seed=seed, stream="forget")
    assert np.array_equal(longer[:batches], order)


@settings(max_examples=100, deadline=None)
@given(**shapes)
def test_shards_partition_a_batch_evenly(rows: int, batches: int, share: int, workers: int, seed: int) -> None:
    size, lengths = share * workers, lengths_of(rows)
    order = batch_order(lengths, batches, size, seed=seed, stream="forget")
    slots = shard_slots(lengths[order], workers)
    assert np.array_equal(np.sort(slots, axis=1), np.broadcast_to(np.arange(size), slots.shape))
    tokens = np.take_along_axis(lengths[order], slots, axis=1).reshape(batches, workers, share)
    spread = tokens.sum(axis=2).max(axis=1) - tokens.sum(axis=2).min(axis=1)
    assert (spread <= tokens.max(axis=(1, 2))).all()  # snake order: shards differ by less than one row
    assert (np.diff(tokens, axis=2) <= 0).all()  # longest first, so micro-batches hold rows of like length


def test_seeds_and_streams_and_epochs_differ() -> None:
    lengths = lengths_of(64)
    first = batch_order(lengths, 16, 8, seed=0, stream="forget")
    assert not np.array_equal(first, batch_order(lengths, 16, 8, seed=1, stream="forget"))
    assert not np.array_equal(first, batch_order(lengths, 16, 8, seed=0, stream="retain"))
    assert not np.array_equal(first[:8], first[8:])


def test_bucketing_saves_padding_and_batches_stay_shuffled() -> None:
    lengths = lengths_of(2000)
    order = batch_order(lengths, 250, 8, seed=0, stream="retain")
    plain = np.random.default_rng(0).permutation(2000).reshape(250, 8)

    def padding(batches: np.ndarray) -> int:
        batch_lengths = lengths[batches]
        return int((batch_lengths.max(axis=1, keepdims=True) - batch_lengths).sum())

    assert padding(order) < 0.25 * padding(plain)
    mean = lengths[order].mean(axis=1)
    assert abs(np.corrcoef(np.arange(250), mean)[0, 1]) < 0.2
