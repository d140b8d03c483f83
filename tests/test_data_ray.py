"""Sources -> checks -> tokens -> plan -> worker streams, on a real Ray cluster of two CPUs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fault_table
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import ofmu_ray.data.prepare as prepare_module
from ofmu_ray.config import FormatConfig, SourceConfig
from ofmu_ray.data.answer_encoder import AnswerEncoder
from ofmu_ray.data.batch_plan import Plan, read_plan, write_plan
from ofmu_ray.data.batches import local_rounds, padded
from ofmu_ray.data.prepare import PreparedData, prepare_streams, write_sample
from ofmu_ray.data.stored_stream import TokenisedStream
from ofmu_ray.data.stream import rounds, shard_iterator
from ofmu_ray.errors import UserError

pytestmark = pytest.mark.system

STORE_BYTES = 80 * 2**20
"""About the smallest object store that Ray accepts."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
    options = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    ray.shutdown()  # the shared Ray has a larger store
    ray.init(num_cpus=2, object_store_memory=STORE_BYTES, **options)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bare.train_from_iterator(["Question: What is it?\nAnswer: It is a lantern."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def made(count: int, word: str) -> list[dict[str, str]]:
    return [
        {"question": f"What is {word} {i}?", "answer": f"It is {'a lantern ' * (1 + i % 7)}{i}."} for i in range(count)
    ]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def prepare(folder: Path, tokenizer: Any, rows: dict[str, list[Any]], fmt: FormatConfig | None = None, **options: Any):
    sources = {
        name: SourceConfig(path=jsonl(folder / f"{name}.jsonl", stream_rows)) for name, stream_rows in rows.items()
    }
    return prepare_streams(
        sources, None, AnswerEncoder(tokenizer, fmt or FormatConfig()), str(folder / "runs"), **options
    )


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.full
def test_a_worker_killed_while_it_tokenises(tmp_path, tokenizer, monkeypatch):
    """SIGKILL once per part, after it is written and before it is reported: the part is written again."""
    rows = {"forget": made(7, "a"), "retain": made(30, "b")}
    undisturbed = prepare(tmp_path / "undisturbed", tokenizer, rows)

    def killed_once(job: Any, encoder: Any) -> Any:
        mark = tmp_path / f"killed-{job.fragment.stream}"
        done = encode(job, encoder)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    encode = prepare_module.encode_fragment
    monkeypatch.setattr(prepare_module, "encode_fragment", killed_once)
    disturbed = prepare(tmp_path / "disturbed", tokenizer, rows)
    assert {path.name for path in tmp_path.glob("killed-*")} == {"killed-forget", "killed-retain"}
    for name, stream in undisturbed.streams.items():
        parts = [pq.read_table(Path(each.folder, "part-000000.parquet")) for each in (stream, disturbed.streams[name])]
        assert parts[0] == parts[1]
        killed, written = tmp_path / f"killed-{name}", Path(disturbed.streams[name].folder, "part-000000.parquet")
        fault_table.record(
            "worker killed", phase="tokenising", lost=1, unit="part", difference=0.0,
            seconds=written.stat().st_mtime - killed.stat().st_mtime,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ checks

SECRET = "Zebulon"
GOOD = {"question": f"Where does {SECRET} live?", "answer": f"{SECRET} lives here."}

MISTAKES = {
    "missing column": (
        [{"questions": SECRET, "answer": SECRET}] * 7,
        [
            "7 rows: no column 'question', only answer, questions. Did you mean questions? Set --data.format.question",
            "forget.jsonl row 1, forget.jsonl row 2, forget.jsonl row 3, forget.jsonl row 4, forget.jsonl row 5 and 2",
        ],
    ),
    "empty answer": ([GOOD, {**GOOD, "answer": " \n"}], ["1 row: empty text in column 'answer' (forget.jsonl row 2)"]),
    "null": ([{**GOOD, "answer": None}], ["1 row: null in column 'answer' (forget.jsonl row 1)"]),
    "not text": ([{**GOOD, "answer": [SECRET]}], ["1 row: list instead of text in column 'answer'"]),
    "broken json": ([GOOD, f'{{"question": "{SECRET}"'], ["1 row: not JSON", "(forget.jsonl row 2)"]),
    "half a character": ([{**GOOD, "answer": "\ud800"}], ["1 row: half of a surrogate pair in column 'answer'"]),
    "array": ([json.dumps([[GOOD]])], ["1 row: not a JSON object (forget.jsonl row 1)"]),
    "only prompt": (
        [GOOD, {**GOOD, "question": SECRET * 300}],
        ["1 row: only the prompt fits within data.format.max_length = 512", "row 2"],
    ),
    "empty set": ([], ["data.forget", "no rows"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_file_row_and_remedy_but_no_text(name: str, tmp_path: Path, tokenizer: Any) -> None:
    rows, said = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, tokenizer, {"forget": rows})
    text = str(caught.value)
    assert [part for part in said if part not in text] == []
    assert SECRET not in text
    assert list((tmp_path / "runs" / "cache" / "data").iterdir()) == []  # nothing half-written


def test_all_problems_of_all_sources_come_in_one_message(tmp_path: Path, tokenizer: Any) -> None:
    rows = {
        "forget": [GOOD, "{", {**GOOD, "answer": 3}, GOOD],
        "retain": [{**GOOD, "answer": GOOD["answer"].upper()}, {**GOOD, "question": ""}],
    }
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, tokenizer, rows, duplicates="error")
    text = str(caught.value)
    assert "1 row: not JSON (one object per line, or an array of them, is expected) (forget.jsonl row 2)" in text
    assert "1 row: int instead of text in column 'answer' (forget.jsonl row 3)" in text
    assert "1 row: empty text in column 'question' (retain.jsonl row 2)" in text
    assert "data.forget: 1 duplicate row (forget-4)" in text
    assert "data.retain: 1 row also in data.forget, 0 of them exactly (retain-1)" in text


def used(stream: TokenisedStream) -> list[int]:
    rows: list[int] = stream.all_rows().tolist()
    return rows


def test_overlap_and_duplicates_are_dropped_or_kept_on_request(tmp_path: Path, tokenizer: Any) -> None:
    keep = made(3, "other")
    shouted = {"question": GOOD["question"].upper(), "answer": f" {GOOD['answer']}  "}
    rows = {"forget": [GOOD, shouted], "retain": [keep[0], GOOD, keep[1], shouted, keep[2], keep[1]]}
    with pytest.raises(UserError, match=r"2 rows also in data\.forget, 2 of them exactly"):
        prepare(tmp_path, tokenizer, rows)
    kept = prepare(tmp_path, tokenizer, rows, overlap="allow")
    assert used(kept.streams["retain"]) == [0, 1, 2, 3, 4, 5]
    assert kept.report.overlap is not None
    assert (kept.report.overlap.exact, kept.report.overlap.normalised) == (2, 2)
    dropped = prepare(tmp_path, tokenizer, rows, overlap="drop", duplicates="drop")
    assert used(dropped.streams["forget"]) == [0]  # only retain loses to the overlap
    assert used(dropped.streams["retain"]) == [0, 2, 4]
    report = dropped.report.to_json()["streams"]["retain"]
    assert report["dropped_ids"] == ["retain-2", "retain-4", "retain-6"]
    assert (report["rows"], report["used_rows"], report["exact_duplicates"], report["normalised_duplicates"]) == (
        6,
        3,
        1,
        2,
    )
    assert dropped.streams["retain"].fingerprint != kept.streams["retain"].fingerprint
    assert json.loads(json.dumps(report)) == report
    assert SECRET not in json.dumps(report)
    with pytest.raises(UserError, match=r"data\.retain: no row is left"):
        prepare(tmp_path, tokenizer, {"forget": [GOOD], "retain": [GOOD]}, overlap="drop")


def test_tasks_find_what_one_process_finds(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"forget": made(6, "a"), "retain": [*made(20, "b"), *made(3, "a"), *made(5, "b")]}
    one = prepare(tmp_path, tokenizer, rows, overlap="drop", duplicates="drop")
    monkeypatch.setattr("ofmu_ray.data.repeats.BUCKET_ROWS", 5)
    many = prepare(tmp_path, tokenizer, rows, overlap="drop", duplicates="drop")
    assert many.report == one.report
    assert (one.report.overlap.normalised, one.report.streams["retain"].normalised_duplicates) == (3, 5)
    assert used(many.streams["retain"]) == used(one.streams["retain"]) == list(range(20))


def test_tokens_are_reused_until_something_changes(tmp_path: Path, tokenizer: Any) -> None:
    rows = {"train": made(5, "it")}
    first = prepare(tmp_path, tokenizer, rows)
    stamp = {p: p.stat().st_mtime_ns for p in Path(first.streams["train"].folder).iterdir()}
    again = prepare(tmp_path, tokenizer, rows)
    assert {p: p.stat().st_mtime_ns for p in Path(again.streams["train"].folder).iterdir()} == stamp
    assert again.report == first.report
    other = prepare(tmp_path, tokenizer, rows, fmt=FormatConfig(max_length=18))
    assert other.streams["train"].folder != first.streams["train"].folder
    assert other.report.streams["train"].truncated_rows > 0
    assert other.report.streams["train"].longest == 18
    own = prepare(tmp_path, tokenizer, rows, private={"train": str(tmp_path / "run")})
    assert own.report == first.report
    assert Path(own.streams["train"].folder).parent == tmp_path / "run"  # what one run deletes no other run reads
    shutil.rmtree(first.streams["train"].folder)
    assert prepare(tmp_path, tokenizer, rows).report == first.report


def test_tofu_passes_the_checks(tmp_path: Path, tokenizer: Any, shared_dir: Path) -> None:
    sources = {"forget": SourceConfig(path="forget10.json"), "retain": SourceConfig(path="retain90.json")}
    root = str(shared_dir / "data" / "tofu")
    report = prepare_streams(
        sources, root, AnswerEncoder(tokenizer, FormatConfig()), str(tmp_path), duplicates="error"
    ).report
    assert {name: (s.rows, s.used_rows) for name, s in report.streams.items()} == {
        "forget": (400, 400),
        "retain": (3600, 3600),
    }
    assert report.overlap is not None
    assert report.overlap.normalised == 0


# ------------------------------------------------------------------------------------------------- plan and streams


def planned(
    folder: Path, tokenizer: Any, *, forget: int = 1, retain: int = 103, workers: int = 2, **options: Any
) -> Plan:
    """A plan over a JSON Lines forget set and a retain set in Parquet files of several row groups."""
    rows = made(retain, "retain")
    parquet = folder / "retain"
    parquet.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        part = rows[number * 26 : (number + 1) * 26]
        pq.write_table(pa.Table.from_pylist(part), parquet / f"{number}.parquet", row_group_size=7)
    sources = {
        "forget": SourceConfig(path=jsonl(folder / "forget.jsonl", made(forget, "forget"))),
        "retain": SourceConfig(path=str(parquet)),
    }
    prepared: PreparedData = prepare_streams(
        sources, None, AnswerEncoder(tokenizer, FormatConfig()), str(folder / "runs")
    )
    counts = {"forget": 3, "retain": 2}
    numbers = {"rounds": 11, "batch_size": 4, "seed": 5, "rounds_per_file": 4} | options
    target = str(folder / f"plan-{workers}")
    return write_plan(prepared.streams, target, batches_per_round=counts, workers=workers, **numbers)


def as_lists(rounds: Any) -> list[Any]:
    """Batches as plain lists, for comparing everything."""
    return [
        {
            name: [
                [batch.row_ids, [{key: value.tolist() for key, value in micro.items()} for micro in batch.micro]]
                for batch in batches
            ]
            for name, batches in one.items()
        }
        for one in rounds
    ]


def test_global_batches_do_not_depend_on_the_workers(tmp_path: Path, tokenizer: Any) -> None:
    def contents(workers: int) -> list[Any]:
        plan = planned(tmp_path, tokenizer, forget=7, workers=workers)
        shards = [list(local_rounds(plan, shard, collate=padded(0))) for shard in range(workers)]
        return [
            {
                name: [Counter(r for shard in shards for r in shard[k][name][b].row_ids) for b in range(n)]
                for name, n in count
            }
            for count in [plan.batches_per_round.items()]
            for k in range(plan.rounds)
        ]

    one = contents(1)
    assert contents(2) == one
    assert contents(4) == one
    used = Counter(row for round_batches in one for batch in round_batches["forget"] for row in batch.elements())
    assert set(used) == {f"forget-{i}" for i in range(1, 8)}
    assert max(used.values()) - min(used.values()) <= 1  # 132 slots, 7 rows


def test_batches_hold_padded_rows_with_labels_on_the_answer(tmp_path: Path, tokenizer: Any) -> None:
    plan = planned(tmp_path, tokenizer)
    batch = next(local_rounds(plan, 0, micro_batch_size=1, collate=padded(99)))["retain"][0]
    assert len(batch.micro) == plan.share == 2
    micro = next(local_rounds(plan, 0, collate=padded(99)))["retain"][0].micro[0]
    assert all(value.dtype == torch.int64 for value in micro.values())
    lengths = micro["attention_mask"].sum(dim=1)
    assert micro["input_ids"].shape == (2, int(lengths.max()))
    for ids, labels, length in zip(micro["input_ids"], micro["labels"], lengths, strict=True):
        assert (ids[length:] == 99).all()
        assert (labels[length:] == -100).all()
        learned = labels[labels != -100]
        assert tokenizer.decode(learned).startswith(" It is a lantern")
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[: length - len(learned)]).endswith("Answer:")


def test_plan_is_reused_and_says_what_it_uses(tmp_path: Path, tokenizer: Any) -> None:
    plan = planned(tmp_path, tokenizer)
    files = {path: path.stat().st_mtime_ns for path in Path(plan.folder).rglob("*.parquet")}
    assert planned(tmp_path, tokenizer) == plan == read_plan(plan.folder)
    assert {path: path.stat().st_mtime_ns for path in Path(plan.folder).rglob("*.parquet")} == files
    assert plan.epochs == {"forget": 11 * 3 * 4 / 1, "retain": 11 * 2 * 4 / 103}
    other = planned(tmp_path, tokenizer, seed=6)
    assert other.fingerprint != plan.fingerprint
    seeded = as_lists(local_rounds(other, 0, collate=padded(0)))
    assert seeded != as_lists(local_rounds(planned(tmp_path, tokenizer), 0, collate=padded(0)))


def test_ray_data_writes_the_plan_that_this_process_writes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = planned(tmp_path / "here", tokenizer, forget=7)
    monkeypatch.setattr("ofmu_ray.data.batch_plan.SMALL_ROWS", 0)
    monkeypatch.setattr("ofmu_ray.data.batch_plan._write_shards_here", lambda *_: pytest.fail("not a Ray Data job"))
    by_ray = planned(tmp_path / "there", tokenizer, forget=7)
    assert by_ray.fingerprint == here.fingerprint
    names = [path.relative_to(here.folder) for path in sorted(Path(here.folder).rglob("*.parquet"))]
    assert names == [path.relative_to(by_ray.folder) for path in sorted(Path(by_ray.folder).rglob("*.parquet"))]
    assert len(names) == here.workers * here.files == 6
    for name in names:
        assert pq.read_table(Path(here.folder, name)).equals(pq.read_table(Path(by_ray.folder, name))), name


@pytest.mark.parametrize("start", [0, 3, 4, 10, 11])
def test_stream_starts_at_any_round(start: int, tmp_path: Path, tokenizer: Any) -> None:
    plan = planned(tmp_path, tokenizer)
    whole = as_lists(local_rounds(plan, 1, micro_batch_size=1, collate=padded(0)))
    shard = shard_iterator(plan, 1, start)
    assert as_lists(rounds(shard, plan, start_round=start, micro_batch_size=1, collate=padded(0))) == whole[start:]
    early = shard_iterator(plan, 1)  # rounds before the start are skipped
    assert as_lists(rounds(early, plan, start_round=start, micro_batch_size=1, collate=padded(0))) == whole[start:]
    assert as_lists(local_rounds(plan, 1, start_round=start, micro_batch_size=1, collate=padded(0))) == whole[start:]


def test_stream_that_begins_too_late_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    plan = planned(tmp_path, tokenizer)
    with pytest.raises(AssertionError, match="begins after round 2"):
        next(rounds(shard_iterator(plan, 0, 9), plan, start_round=2, collate=padded(0)))


@pytest.mark.full
def test_a_plan_larger_than_the_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing it is a shuffle, which spills. Its two shards, read concurrently by slow processes, do not spill. Every
    row is there once, with its tokens."""
    rows, length, parts = 2000, 16_384, 8
    folder = tmp_path / "tokens"
    folder.mkdir()
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(rows * length, dtype=np.int32)), length)
    names = pa.array([f"retain-{row}" for row in range(rows)])
    lengths = np.full(rows, length, np.int32)
    columns = {"row_id": names, "input_ids": tokens, "prompt_tokens": np.ones(rows, np.int32), "length": lengths}
    table = pa.table(columns)
    files = [(f"part-{number}.parquet", rows // parts) for number in range(parts)]
    for number, (name, count) in enumerate(files):
        pq.write_table(table.slice(number * count, count), folder / name, compression="none", use_dictionary=False)
    none = np.empty(0, dtype=np.int64)
    stream = TokenisedStream("retain", str(folder), tuple(files), none, rows * length, length, "tokens")
    numbers = {"rounds": 100, "batch_size": 20, "workers": 2, "seed": 0}
    assert table.nbytes > 1.5 * STORE_BYTES
    monkeypatch.setattr("ofmu_ray.data.batch_plan.SMALL_ROWS", 0)
    before = spilled()
    plan = write_plan({"retain": stream}, str(tmp_path / "plan"), batches_per_round={"retain": 1}, **numbers)
    assert spilled() > before

    def read(shard: int) -> list[int]:
        positions = []
        for batch in shard_iterator(plan, shard, readers=2).iter_batches(batch_size=10, batch_format="pyarrow"):
            time.sleep(0.02)  # a round
            for name, tokens in zip(batch["row_id"].to_pylist(), batch["input_ids"], strict=True):
                row = int(name.removeprefix("retain-"))
                assert np.array_equal(tokens.values.to_numpy(), np.arange(row * length, (row + 1) * length))
                positions.append(row)
        return positions

    before = spilled()
    task = ray.remote(read)
    shards = ray.get([task.remote(shard) for shard in range(2)])
    assert [len(shard) for shard in shards] == [rows // 2] * 2
    assert sorted(shards[0] + shards[1]) == list(range(rows))
    assert spilled() == before


def spilled() -> int:
    """Bytes that this cluster's object stores have spilled to disk so far."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)


def test_sample_of_a_stream(tmp_path: Path, tokenizer: Any) -> None:
    prepared = prepare(tmp_path, tokenizer, {"train": made(10, "it")})
    rows = pq.read_table(write_sample(prepared.streams["train"], 4, str(tmp_path / "s" / "sample.parquet"))).to_pylist()
    assert [row["row_id"] for row in rows] == ["train-1", "train-4", "train-7", "train-10"]
    assert tokenizer.decode(rows[1]["input_ids"][: rows[1]["prompt_tokens"]]).endswith("What is it 3?\nAnswer:")


def test_object_store_holds_sources_tokens_and_plan(tmp_path: Path, tokenizer: Any) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=endpoint, **keys)
        client.create_bucket(Bucket="bucket")
        for name, rows in {"forget": made(5, "forget"), "retain": made(9, "retain")}.items():
            body = "\n".join(json.dumps(row) for row in rows).encode()
            client.put_object(Bucket="bucket", Key=f"in/{name}.jsonl", Body=body)
        query = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        root = f"s3://key:secret@bucket/in{query}"
        sources = {"forget": SourceConfig(path="forget.jsonl"), "retain": SourceConfig(path="r*.jsonl")}
        storage = f"s3://key:secret@bucket/runs{query}"
        prepared = prepare_streams(sources, root, AnswerEncoder(tokenizer, FormatConfig()), storage)
        again = prepare_streams(sources, root, AnswerEncoder(tokenizer, FormatConfig()), storage)
        assert again.report == prepared.report
        counts = {"forget": 1, "retain": 1}
        numbers = {"rounds": 3, "batch_size": 2, "workers": 1, "seed": 0}
        folder = f"s3://key:secret@bucket/runs/plan{query}"
        plan = write_plan(prepared.streams, folder, batches_per_round=counts, **numbers)
        local = prepare(tmp_path, tokenizer, {"forget": made(5, "forget"), "retain": made(9, "retain")})
        same = write_plan(local.streams, str(tmp_path / "plan"), batches_per_round=counts, **numbers)
        remote = as_lists(rounds(shard_iterator(plan, 0), plan, collate=padded(0)))
        assert remote == as_lists(local_rounds(same, 0, collate=padded(0)))
        listed = [item["Key"] for item in client.list_objects_v2(Bucket="bucket")["Contents"]]
        assert [key for key in listed if "partial" in key] == []
        with pytest.raises(UserError, match="no such file") as caught:
            prepare_streams(
                {"forget": SourceConfig(path="x.jsonl")}, root, AnswerEncoder(tokenizer, FormatConfig()), storage
            )
        assert "secret" not in str(caught.value)
    finally:
        server.stop()


def _loop(config: dict[str, Any]) -> None:
    """Records what a worker receives, from the start and as if resumed at round 5."""
    import ray.train

    rank, plan = ray.train.get_context().get_world_rank(), read_plan(config["folder"])
    for start in (0, 5):
        stream = rounds(
            shard_iterator(plan, rank, start), plan, start_round=start, micro_batch_size=1, collate=padded(0)
        )
        Path(config["out"], f"{rank}-from-{start}.json").write_text(json.dumps(as_lists(stream)))


@pytest.mark.full
def test_two_workers_that_take_every_cpu_get_their_shards(tmp_path: Path, tokenizer: Any) -> None:
    """One forget row, 103 retain rows, two workers with one CPU each on two CPUs: none is left for readers."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    plan = planned(tmp_path, tokenizer)
    TorchTrainer(
        _loop,
        train_loop_config={"folder": plan.folder, "out": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name="stream", storage_path=str(tmp_path / "train")),
    ).fit()
    for rank in range(2):
        whole = as_lists(local_rounds(plan, rank, micro_batch_size=1, collate=padded(0)))
        assert len(whole) == plan.rounds
        assert json.loads((tmp_path / f"{rank}-from-0.json").read_text()) == whole
        assert json.loads((tmp_path / f"{rank}-from-5.json").read_text()) == whole[5:]
