"""Rows of a plan -> micro-batches of tensors. No Ray: the stream, tests and probes share this code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from ofmu_ray.data.batch import IGNORED, Batch
from ofmu_ray.data.batch_plan import Plan
from ofmu_ray.data.shard_files import Reading, read_pieces, shard_files
from ofmu_ray.data.sidecar import Sidecar, open_sidecars

Rows = Sequence[Mapping[str, Any]]
Collate = Callable[[Rows], dict[str, torch.Tensor]]
"""Rows of encoded columns -> one micro-batch."""

RoundBatches = dict[str, list[Batch]]
"""Batches of one round by stream name."""


def local_rounds(
    plan: Plan,
    shard: int,
    *,
    start_round: int = 0,
    micro_batch_size: int | None = None,
    collate: Collate,
    sidecars: Mapping[str, str] | None = None,
    reading: Reading | None = None,
) -> Iterator[RoundBatches]:
    """The batches of `stream.rounds`, read with pyarrow in this process: the reference, and the path without Ray."""
    tables = (
        table.slice(at, plan.rows_per_round)
        for path in shard_files(plan, shard, start_round)
        for table in [pa.concat_tables(read_pieces(path))]
        for at in range(0, table.num_rows, plan.rows_per_round)
    )
    if reading is not None:
        complete = reading
        tables = (complete(table, plan) for table in tables)
    options: dict[str, Any] = {"micro_batch_size": micro_batch_size, "collate": collate, "sidecars": sidecars}
    yield from assemble(tables, plan, start_round=start_round, **options)


def assemble(
    tables: Iterable[pa.Table],
    plan: Plan,
    *,
    start_round: int,
    micro_batch_size: int | None,
    collate: Collate,
    sidecars: Mapping[str, str] | None = None,
) -> Iterator[RoundBatches]:
    """Batches of each table, which contains one round of one shard; rounds before `start_round` are skipped.

    `sidecars`: stream -> folder with stored values of its rows, which are added to its micro-batches.

    Raises AssertionError if a round is missing, incomplete or out of order.
    """
    expected = None
    opened = open_sidecars(sidecars)
    for table in tables:
        number, offset = divmod(table["position"][0].as_py(), plan.rows_per_round)
        assert offset == 0, f"round {number} begins inside a batch"
        assert table.num_rows == plan.rows_per_round, f"round {number}: {table.num_rows} rows"
        assert expected in (None, number), f"round {number} follows {expected}"
        assert expected is not None or number <= start_round, f"the shard begins after round {start_round}"
        expected = number + 1
        if number >= start_round:
            yield _round(table, plan, micro_batch_size or plan.share, collate, opened)
    assert expected == plan.rounds, f"the shard ends before round {plan.rounds}"


def padded(pad_id: int) -> Collate:
    """`collate` with this padding."""
    return partial(collate, pad_id=pad_id)


def collate(rows: Rows, pad_id: int) -> dict[str, torch.Tensor]:
    """Rows with `input_ids` and `prompt_tokens` as LongTensors [rows, longest], padded on the right.

    Keys: input_ids, attention_mask, labels (-100 on prompt and padding; as transformers, not shifted).
    """
    shape = len(rows), max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for index, row in enumerate(rows):
        tokens, prompt = torch.as_tensor(row["input_ids"], dtype=torch.long), int(row["prompt_tokens"])
        batch["input_ids"][index, : len(tokens)] = tokens
        batch["attention_mask"][index, : len(tokens)] = 1
        batch["labels"][index, prompt : len(tokens)] = tokens[prompt:]
    return batch


def _round(
    table: pa.Table, plan: Plan, micro_batch_size: int, collate: Collate, sidecars: Mapping[str, Sidecar]
) -> RoundBatches:
    batches: RoundBatches = {}
    number, at = table["position"][0].as_py() // plan.rows_per_round, 0
    for name in plan.streams:
        batches[name] = []
        for batch in range(plan.batches_per_round[name]):
            # the epoch in which the global batch starts, for any number of workers
            epoch = (number * plan.batches_per_round[name] + batch) * plan.batch_size // plan.rows[name]
            rows = table.slice(at, plan.share).to_pylist()
            pieces = [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]
            micro = [_collate_with(sidecars.get(name), piece, collate, epoch) for piece in pieces]
            batches[name].append(Batch(micro=micro, row_ids=[row["row_id"] for row in rows]))
            at += plan.share
    return batches


def _collate_with(sidecar: Sidecar | None, rows: Rows, collate: Collate, epoch: int) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    if sidecar is not None:
        row_ids = [row["row_id"] for row in rows]
        batch |= sidecar.values(row_ids, epoch)
        for prefix, texts in sidecar.texts(row_ids, epoch).items():
            batch |= {prefix + name: tensor for name, tensor in collate(texts).items()}
    return batch
