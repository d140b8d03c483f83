"""The worker's side of a plan: rounds of batches, read ahead by Ray Data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ofmu_ray.data import store
from ofmu_ray.data.plan import Plan
from ofmu_ray.engines.protocol import Batch

if TYPE_CHECKING:
    from ray.data import DataIterator

IGNORE = -100
"""Label of tokens without a loss (torch's cross_entropy default)."""

RoundBatches = dict[str, list[Batch]]
"""Batches of one round by stream name."""


def rounds(
    shard: DataIterator, plan: Plan, *, start_round: int, micro_batch_size: int | None, pad_id: int
) -> Iterator[RoundBatches]:
    """This worker's batches, one dict per round from `start_round` on.

    `shard` may begin earlier than `start_round` (its rounds are skipped) but not later. Micro-batches are dicts of
    right-padded LongTensors [rows, tokens]: input_ids, attention_mask, labels (-100 on prompt and padding).
    """
    tables = shard.iter_batches(batch_size=plan.rows_per_round, batch_format="pyarrow", prefetch_batches=2)
    yield from _rounds(tables, plan, start_round, micro_batch_size, pad_id)


def local_rounds(
    plan: Plan, *, lane: int, start_round: int = 0, micro_batch_size: int | None, pad_id: int
) -> Iterator[RoundBatches]:
    """The same batches as `rounds`, by plain pyarrow in this process."""
    tables = (
        table.slice(at, plan.rows_per_round)
        for path in lane_files(plan, lane, start_round)
        for table in [_read(path)]
        for at in range(0, table.num_rows, plan.rows_per_round)
    )
    yield from _rounds(tables, plan, start_round, micro_batch_size, pad_id)


def lane_files(plan: Plan, lane: int, start_round: int = 0) -> list[str]:
    """Files of a lane from the one that holds `start_round`."""
    first = min(start_round, plan.rounds - 1) // plan.rounds_per_file
    return [plan.file(lane, number) for number in range(first, plan.files)]


def lane_iterator(plan: Plan, lane: int, start_round: int = 0) -> DataIterator:
    """Ray Data iterator over one lane from the file that holds `start_round`, in order, one file read ahead.

    Its tasks ask for no CPU: they must run while every core is taken by training workers.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else each worker tells of every execution
    items = [{"path": path} for path in lane_files(plan, lane, start_round)]
    ahead = ray.data.TaskPoolStrategy(size=min(2, len(items)))
    data = ray.data.from_items(items, override_num_blocks=len(items))
    data = data.map_batches(_read_item, batch_size=1, batch_format="numpy", num_cpus=0, compute=ahead)
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    return data.iterator()


def _read_item(batch: dict[str, Any]) -> pa.Table:
    return _read(str(batch["path"][0]))


def _read(path: str) -> pa.Table:
    filesystem, inside = store.locate(path)
    return pq.read_table(inside, filesystem=filesystem)


# ----------------------------------------------------------------------------------------------------------- batches


def _rounds(
    tables: Iterable[pa.Table], plan: Plan, start_round: int, micro_batch_size: int | None, pad_id: int
) -> Iterator[RoundBatches]:
    expected = None
    for table in tables:
        number, offset = divmod(table["position"][0].as_py(), plan.rows_per_round)
        assert offset == 0, f"round {number} begins inside a batch"
        assert table.num_rows == plan.rows_per_round, f"round {number}: {table.num_rows} rows"
        assert expected in (None, number), f"round {number} follows {expected}"
        assert expected is not None or number <= start_round, f"the shard begins after round {start_round}"
        expected = number + 1
        if number >= start_round:
            yield _round(table, plan, micro_batch_size or plan.share, pad_id)
    assert expected in (None, plan.rounds), f"the shard ends before round {plan.rounds}"


def _round(table: pa.Table, plan: Plan, micro_batch_size: int, pad_id: int) -> RoundBatches:
    batches: RoundBatches = {}
    at = 0
    for name in plan.streams:
        batches[name] = []
        for _ in range(plan.batches_per_round[name]):
            batches[name].append(_batch(table.slice(at, plan.share), micro_batch_size, pad_id))
            at += plan.share
    return batches


def _batch(table: pa.Table, micro_batch_size: int, pad_id: int) -> Batch:
    ids, prompts = table["input_ids"].to_pylist(), table["prompt_tokens"].to_pylist()
    starts = range(0, len(ids), micro_batch_size)
    micro = [collate(ids[s : s + micro_batch_size], prompts[s : s + micro_batch_size], pad_id) for s in starts]
    return Batch(micro=micro, row_ids=table["row_id"].to_pylist())


def collate(ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows as LongTensors [rows, longest], padded on the right: input_ids, attention_mask, labels."""
    shape = len(ids), max(map(len, ids))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE),
    }
    for row, (tokens, prompt) in enumerate(zip(ids, prompt_tokens, strict=True)):
        batch["input_ids"][row, : len(tokens)] = torch.tensor(tokens)
        batch["attention_mask"][row, : len(tokens)] = 1
        batch["labels"][row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return batch
