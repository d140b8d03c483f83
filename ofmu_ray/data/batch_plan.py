"""The batch sequence is a data set: every batch of a run, written once, in the order in which each worker reads it.

`<folder>/lane=0000/rounds=000000-000063.parquet` contains the rows of 64 rounds of one worker, ordered by round,
stream, batch and slot. All shards have the same number of rows, so workers are in lockstep by construction; a run
resumes by opening the file of its next round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ofmu_ray.cluster.map_tasks import running_ray
from ofmu_ray.data.encoder import plan_columns
from ofmu_ray.data.order import batch_order, shard_slots
from ofmu_ray.data.stored_stream import TokenisedStream
from ofmu_ray.data.tokenise import part_columns, take_part
from ofmu_ray.storage import (
    absolute,
    is_file,
    join,
    locate,
    published,
    read_text,
    remove_folder,
    without_credentials,
    write_text,
)

MARKER = "plan.json"
VERSION = 1
"""Version of the layout below; part of the plan's hash."""

SMALL_ROWS = 100_000
"""This process writes plans of at most this many rows: a Ray Data job would take longer to start."""

ROW_GROUP_BYTES = 2**21
"""Readers load a shard's file in pieces of about this size."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of `plan.json`."""

    folder: str
    streams: list[str]
    """Order of the streams within a round."""
    rounds: int
    batches_per_round: dict[str, int]
    batch_size: int
    """Rows of one batch over all workers."""
    workers: int
    rounds_per_file: int
    seed: int
    rows: dict[str, int]
    """Rows of each stream."""
    epochs: dict[str, float]
    """Passes of the plan over each stream."""
    fingerprint: str
    """Digest of the data and of everything above, independent of the plan's location."""

    @property
    def share(self) -> int:
        """Rows of one batch on one worker."""
        return self.batch_size // self.workers

    @property
    def rows_per_round(self) -> int:
        """Rows of one round on one worker."""
        return self.share * sum(self.batches_per_round.values())

    @property
    def total_rows(self) -> int:
        """Rows in all files of the plan."""
        return self.rounds * self.rows_per_round * self.workers

    @property
    def files(self) -> int:
        """Files of one shard."""
        return -(-self.rounds // self.rounds_per_file)

    def file(self, shard: int, number: int) -> str:
        """Path of a file of a shard."""
        first = number * self.rounds_per_file
        last = min(first + self.rounds_per_file, self.rounds) - 1
        return join(self.folder, f"lane={shard:04d}", f"rounds={first:06d}-{last:06d}.parquet")


def read_plan(folder: str) -> Plan:
    """The plan that `write_plan` left in a folder. Raises AssertionError if there is none."""
    folder = absolute(folder)
    path = join(folder, MARKER)
    assert is_file(path), f"no plan at {without_credentials(path)}"
    return Plan(folder=folder, **json.loads(read_text(path)))


def write_plan(
    streams: Mapping[str, TokenisedStream],
    folder: str,
    *,
    batches_per_round: Mapping[str, int],
    rounds: int,
    batch_size: int,
    workers: int,
    seed: int,
    rounds_per_file: int = 64,
    here: bool = False,
) -> Plan:
    """Decide every batch and write it with Ray Data, or return the existing plan.

    The plan contains only the streams that `batches_per_round` names.

    The content of a global batch depends on data and seed, never on `workers`. More than `SMALL_ROWS` rows are written
    with Ray if it is running, unless `here`. Raises AssertionError if `workers` does not divide `batch_size` (which the
    configuration refuses).
    """
    folder = absolute(folder)
    assert batch_size % workers == 0, f"batch of {batch_size} rows over {workers} workers"
    numbers = {"rounds": rounds, "batch_size": batch_size, "workers": workers, "seed": seed}
    numbers["rounds_per_file"] = rounds_per_file
    streams = {name: stream for name, stream in streams.items() if name in batches_per_round}
    counts = {name: batches_per_round[name] for name in streams}
    content = [VERSION, numbers, counts, {name: stream.fingerprint for name, stream in streams.items()}]
    plan = Plan(
        folder=folder,
        streams=list(streams),
        batches_per_round=counts,
        rows={name: stream.used_rows for name, stream in streams.items()},
        epochs={name: rounds * counts[name] * batch_size / stream.used_rows for name, stream in streams.items()},
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        **numbers,
    )
    if is_file(join(folder, MARKER)) and read_plan(folder).fingerprint == plan.fingerprint:
        return plan
    remove_folder(folder)
    with published(folder, MARKER) as partial_folder:
        small = here or plan.total_rows <= SMALL_ROWS or running_ray() is None
        write = _write_shards_here if small else _write_shards
        write(plan, streams, partial_folder)
        text = {key: value for key, value in asdict(plan).items() if key != "folder"}
        write_text(join(partial_folder, MARKER), json.dumps(text, indent=1))
    return plan


# --------------------------------------------------------------------------------------------------- places of rows


@dataclass(frozen=True)
class Slots:
    """Where the rows of one stream go, sorted by row."""

    row: np.ndarray
    """int64 [places], index of the row over all parts of the stream."""
    shard: np.ndarray
    """int32 [places]."""
    position: np.ndarray
    """int64 [places], position in the shard over all rounds."""


def places(stream: TokenisedStream, plan: Plan) -> Slots:
    """Every place of every row of a stream."""
    per_round = plan.batches_per_round[stream.name]
    rows, batches = stream.used_rows, plan.rounds * per_round
    order = batch_order(
        rows, batches, plan.batch_size, lengths=stream.lengths_at, seed=plan.seed, stream=stream.name
    )  # [batches, batch_size]
    slots = shard_slots(stream.lengths_at(order), plan.workers)
    dealt = np.take_along_axis(order, slots, axis=1).reshape(plan.rounds, per_round, plan.workers, plan.share)
    before = sum(plan.batches_per_round[name] for name in plan.streams[: plan.streams.index(stream.name)])
    start = np.arange(plan.rounds)[:, None, None, None] * plan.rows_per_round + before * plan.share
    batch = np.arange(per_round)[None, :, None, None] * plan.share
    position = np.broadcast_to(start + batch + np.arange(plan.share), dealt.shape)
    shard = np.broadcast_to(np.arange(plan.workers, dtype=np.int32)[None, None, :, None], dealt.shape)
    row = stream.rows_at(dealt.ravel())
    by_row = np.argsort(row, kind="stable")
    return Slots(row[by_row], shard.ravel()[by_row], position.ravel()[by_row])


def _write_shards_here(plan: Plan, streams: Mapping[str, TokenisedStream], folder: str) -> None:
    """The files of `_write_shards` without Ray."""
    chunk_rows = plan.rounds_per_file * plan.rows_per_round
    target = Plan(**{**asdict(plan), "folder": folder})
    pieces = [_spread(item["path"], item["places"], chunk_rows, plan.files) for item in _explosions(streams, plan)]
    table = pa.concat_tables(pieces)
    for group in range(plan.workers * plan.files):
        _write_group(table.filter(pc.equal(table["group"], group)), plan=target)


def _write_shards(plan: Plan, streams: Mapping[str, TokenisedStream], folder: str) -> None:
    """One Ray Data job: repeat each row once per place, group by file, write each group."""
    import ray
    import ray.data

    from ofmu_ray.data.ray_data import TASK_CPUS, quiet

    items = [item | {"places": ray.put(item["places"])} for item in _explosions(streams, plan)]
    chunk_rows = plan.rounds_per_file * plan.rows_per_round
    target = Plan(**{**asdict(plan), "folder": folder})
    groups = plan.workers * plan.files
    with quiet():
        exploded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            partial(_explode, chunk_rows=chunk_rows, files=plan.files),
            batch_size=1,
            batch_format="numpy",
            num_cpus=TASK_CPUS,
        )
        written = (
            exploded.groupby("group", num_partitions=min(groups, 4 * len(items), 200))
            .map_groups(partial(_write_group, plan=target), batch_format="pyarrow", num_cpus=TASK_CPUS)
            .take_all()
        )
    rows = sum(int(row["rows"]) for row in written)
    assert len(written) == groups, f"{len(written)} of {groups} files written"
    assert rows == plan.workers * plan.rounds * plan.rows_per_round, f"{rows} rows written"


def _explosions(streams: Mapping[str, TokenisedStream], plan: Plan) -> list[dict[str, Any]]:
    """One item per part of each stream: its file and the places of its rows."""
    items = []
    for stream in streams.values():
        slots, first = places(stream, plan), 0
        for name, rows in stream.parts:
            low, high = np.searchsorted(slots.row, [first, first + rows])
            if high > low:
                piece = Slots(slots.row[low:high] - first, slots.shard[low:high], slots.position[low:high])
                items.append({"path": join(stream.folder, name), "places": piece})
            first += rows
    return items


def _explode(batch: dict[str, np.ndarray], *, chunk_rows: int, files: int) -> pa.Table:
    import ray

    return _spread(str(batch["path"][0]), ray.get(batch["places"][0]), chunk_rows, files)


def _spread(part: str, slots: Slots, chunk_rows: int, files: int) -> pa.Table:
    """The rows of one part, repeated once per place, with their `position` and the number of their file."""
    table = take_part(part, slots.row, plan_columns(part_columns(part)))
    table = table.append_column("position", pa.array(slots.position))
    return table.append_column("group", pa.array(slots.shard.astype(np.int64) * files + slots.position // chunk_rows))


def _write_group(table: pa.Table, *, plan: Plan) -> pa.Table:
    shard, number = divmod(table["group"][0].as_py(), plan.files)
    filesystem, path = locate(plan.file(shard, number))
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    names = [name for name in table.column_names if name not in ("position", "group")]
    ordered = table.select(["position", *names]).sort_by("position")  # position of the row in its shard
    piece = max(1, ordered.num_rows * ROW_GROUP_BYTES // max(1, ordered.nbytes))
    pq.write_table(ordered, path, filesystem=filesystem, row_group_size=piece)
    return pa.table({"rows": [table.num_rows]})
