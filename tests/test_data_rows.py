"""Data of any size: what reading, comparing and planning many rows touches."""

import dataclasses
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ofmu_ray.config import FormatConfig, SourceConfig
from ofmu_ray.data import content, repeats, sources, stored_stream
from ofmu_ray.data.evaluation_rows import evaluation_rows
from ofmu_ray.data.order import batch_order
from ofmu_ray.data.repeats import find_matches
from ofmu_ray.data.sources import Fragment
from ofmu_ray.data.stored_stream import StoredStream, TokenisedStream
from ofmu_ray.data.tokenise import take_part, take_rows
from ofmu_ray.errors import UserError


def pieces_of(path: Path, **options: Any) -> list[Fragment]:
    source = SourceConfig(path=str(path), **options)
    return sources.fragments(source, None, stream="retain", option="data.retain")


def rows_of(pieces: list[Fragment]) -> list[tuple[str, Any]]:
    return [(piece.row_id(number), row) for piece in pieces for number, row in sources.read(piece)]


def aged(path: Path, seconds: int = 60) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - seconds * 10**9))


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("size", [1, 40, 1000])
def test_a_file_of_lines_is_split_by_bytes(
    size: int, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        json.dumps({"question": f"é {number}" * (number % 5), "answer": "a"}, ensure_ascii=False)
        for number in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    between = end or "\n"
    text = "\ufeff" + between.join([*rows[:9], "", "", "{", *rows[9:]]) + end
    path.write_bytes(text.encode())
    whole = pieces_of(path)
    monkeypatch.setattr(content, "RANGE_BYTES", size)
    split = pieces_of(path)
    assert len(whole) == 1 < len(split)
    assert rows_of(split) == rows_of(whole)
    assert rows_of(split)[-1][0] == "retain-43"  # the number of its line
    assert sources.fingerprint(split) == sources.fingerprint(whole)
    assert rows_of(pieces_of(path, limit=15)) == rows_of(whole)[:15]
    for name in ("array.json", "rows.jsonl.gz"):
        (tmp_path / name).write_bytes(b"\n [\n" + b",\n".join([b"{}"] * 99) + b"]")
        assert len(pieces_of(tmp_path / name)) == 1


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reads, read = [], content._read
    monkeypatch.setattr(content, "_read", lambda path: reads.append(path) or read(path))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    first = content.content(str(path))
    content.content(str(path))
    assert len(reads) == 2  # it may still change within a tick of the clock
    aged(path)
    assert content.content(str(path)) == content.content(str(path)) == first
    assert len(reads) == 3
    path.write_text('{"question": "Q", "answer": "a"}\n')  # as long as before
    aged(path, 30)
    assert content.content(str(path)) != first
    assert len(reads) == 4
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(content, "RANGE_BYTES", 8)  # now it is a large file
    content._known.cache_clear()
    large = content.content(str(path))
    content._known.cache_clear()  # another process
    assert content.content(str(path)) == large
    assert len(reads) == 5


def test_evaluation_reads_the_rows_and_columns_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"id": i, "question": f"q{i}", "answer": f"a{i}", "notes": "n" * 99} for i in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    asked: list[tuple[int, list[int], list[str]]] = []
    batches = pq.ParquetFile.iter_batches

    def recorded(self: Any, size: int, *, row_groups: list[int], columns: list[str]) -> Any:
        asked.append((size, row_groups, columns))
        return batches(self, size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    found = evaluation_rows(str(path), None, 400, name="retain")
    assert [row["row_id"] for row in found] == [f"retain-{number}" for number in range(1, 401)]
    assert found[399] == {"row_id": "retain-400", "question": "q399", "answer": "a399"}
    assert asked == [(400, [0], ["question", "answer"])]
    assert len(evaluation_rows(str(path), None, 1001)) == 1001
    with pytest.raises(UserError, match="no column 'prompt', only answer, id, notes, question"):
        evaluation_rows(str(path), None, 3, fmt=FormatConfig(question="prompt"))


@pytest.mark.slow
def test_data_sets_travel_as_the_names_of_their_files(tmp_path: Path) -> None:
    import datasets

    rows = [{"question": f"q{number}", "answer": "a" * 50, "notes": "n"} for number in range(45_000)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    pieces = pieces_of(tmp_path / "saved")
    assert [piece.first_row for piece in pieces] == [1, 20_001, 40_001]
    assert max(len(pickle.dumps(piece)) for piece in pieces) < 10_000
    again = [pickle.loads(pickle.dumps(piece)) for piece in pieces]
    read = [row for piece in again for _, row in sources.read(piece, ["question", "answer"])]
    assert read == [{**row, "notes": None} for row in rows]
    assert len(rows_of(pieces_of(tmp_path / "saved", limit=20_005))) == 20_005


def stored(folder: Path, name: str, digests: list[list[int]], parts: int) -> StoredStream:
    """A stream whose rows have these texts, by number; an odd one differs from the even one before only in case."""
    places = []
    for number, part in enumerate(np.array_split(np.arange(len(digests)), parts)):
        exact = [b"".join(b"%016d" % text for text in digests[row]) for row in part]
        normalised = [b"".join(b"%016d" % (text // 2 * 2) for text in digests[row]) for row in part]
        table = pa.table({"exact": pa.array(exact, pa.binary()), "normalised": pa.array(normalised, pa.binary())})
        pq.write_table(table, folder / f"{name}-{number}", row_group_size=3)
        places.append((f"{name}-{number}", len(part)))
    return StoredStream(name, str(folder), tuple(places))


@pytest.mark.parametrize("packed", [False, True])
def test_matches_do_not_depend_on_buckets(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(packed)
    count = 3 if packed else 1
    texts = {
        name: [random.integers(0, 80, random.integers(1, count + 1)).tolist() for _ in range(rows)]
        for name, rows in {"forget": 20, "retain": 60, "holdout": 0}.items()
    }
    streams = [stored(tmp_path, name, rows, parts=4) for name, rows in texts.items()]
    one = find_matches(streams)
    monkeypatch.setattr(repeats, "BUCKET_ROWS", 7)
    many = find_matches(streams)
    for name, rows in texts.items():
        for same, field in ((lambda text: text, "exact"), (lambda text: text // 2, "normalised")):
            seen: set[int] = set()
            again = []
            for row, own in enumerate(rows):
                for text in own:
                    if same(text) in seen:
                        again.append(row)
                    seen.add(same(text))
            expected = sorted(set(again))
            assert getattr(one[name], field).tolist() == getattr(many[name], field).tolist() == expected
        forget = {text // 2 for own in texts["forget"] for text in own}
        shared = [row for row, own in enumerate(rows) if name == "retain" and forget & {text // 2 for text in own}]
        assert one[name].shared.tolist() == many[name].shared.tolist() == shared
    assert 0 < len(one["retain"].shared_exact) < len(one["retain"].shared)
    assert one["retain"].shared_exact.tolist() == many["retain"].shared_exact.tolist()


def test_rows_are_taken_from_the_groups_that_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"row_id": [f"r{number}" for number in range(50)], "length": np.arange(50)})
    pq.write_table(table.slice(0, 30), tmp_path / "a", row_group_size=7)
    pq.write_table(table.slice(30), tmp_path / "b", row_group_size=7)
    groups: list[list[int]] = []
    read = pq.ParquetFile.read_row_groups

    def recorded(self: Any, numbers: list[int], **options: Any) -> pa.Table:
        groups.append(numbers)
        return read(self, numbers, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", recorded)
    rows = np.array([0, 6, 22, 29, 30, 49])
    assert take_rows(str(tmp_path), ["a", "b"], rows).equals(table.take(rows).select(["row_id"]))
    assert groups == [[0, 3, 4], [0, 2]]
    repeated = np.array([1, 1, 20, 20, 20, 28])
    assert take_part(str(tmp_path / "a"), repeated, ["row_id", "length"]).equals(table.take(repeated))
    assert take_rows(str(tmp_path), ["a", "b"], np.array([], dtype=np.int64)).num_rows == 0


def test_a_long_stream_is_read_for_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 60).astype(np.int32)
    parts = []
    for number, part in enumerate(np.array_split(lengths, 4)):
        ids = [f"{number}-{row}" for row in range(len(part))]
        pq.write_table(pa.table({"row_id": ids, "length": part}), tmp_path / f"{number}", row_group_size=4)
        parts.append((f"{number}", len(part)))
    dropped = np.array([0, 1, 14, 15, 16, 40, 59])
    kept = np.setdiff1d(np.arange(60), dropped)
    held = TokenisedStream("retain", str(tmp_path), tuple(parts), dropped, int(lengths[kept].sum()), 199, "")
    assert held.used_rows == len(kept)
    assert held.rows_at(np.arange(len(kept))).tolist() == kept.tolist()
    at = np.array([[52, 0, 0], [13, 30, 52]])
    assert np.array_equal(held.lengths_at(at), lengths[kept][at])
    assert held.spread(3).tolist() == [kept[0], kept[26], kept[-1]]
    monkeypatch.setattr(stored_stream, "HELD_ROWS", 10)
    read = dataclasses.replace(held)
    assert np.array_equal(read.lengths_at(at), lengths[kept][at])
    assert "_all_lengths" not in vars(read)


def test_the_order_of_earlier_releases() -> None:
    """Another one would change every plan."""
    lengths = np.random.default_rng(0).integers(5, 200, 1000)
    order = batch_order(len(lengths), 300, 12, lengths=lengths.__getitem__, seed=3, stream="forget")
    assert (
        hashlib.sha256(order.tobytes()).hexdigest()
        == "20de7a73c16794a7562ea2ca369094dce2c9eb556cc261511349ff49e4348358"
    )
