"""Documents and chats as rows: windows, packing, shapes of files, checks. No Ray."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_models import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from ofmu_ray.config import (
    DataConfig,
    FormatConfig,
    ImagesConfig,
    SourceConfig,
    SplitConfig,
    TrainDataConfig,
    UnlearnConfig,
    apply_overrides,
    outcome_hash,
)
from ofmu_ray.data import sources
from ofmu_ray.data.batch_plan import write_plan
from ofmu_ray.data.batches import local_rounds, padded
from ofmu_ray.data.evaluation_rows import evaluation_rows
from ofmu_ray.data.kinds import StreamEncoders
from ofmu_ray.data.prepare import PreparedData, prepare_streams
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.data.windows import TextLayout
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.evaluator import read_sets

SECRET = "Zebulon"
CHATML = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer: Any) -> Any:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML
    return other


def prepare(folder: Path, tokenizer: Any, data: DataConfig) -> PreparedData:
    encoders = StreamEncoders.of(tokenizer, data.format, {name: data.kind(name) for name in data.sources})
    options = {"overlap": data.overlap, "duplicates": data.duplicates, "whole": data.whole}
    return prepare_streams(data.sources, None, encoders, str(folder / "runs"), **options)


def lines(path: Path, rows: list[Any]) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def documents(count: int, seed: int = 0) -> list[str]:
    """Random words, one to about 90."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(0, 10_000, size)) for size in rng.geometric(0.1, count)]


def rows_of(prepared: PreparedData, name: str) -> list[dict[str, Any]]:
    stream = prepared.streams[name]
    return [row for part, _ in stream.parts for row in pq.read_table(Path(stream.folder, part)).to_pylist()]


def texts_of(source: SourceConfig) -> list[str]:
    pieces = sources.fragments(source, None, stream="forget", option="data.forget")
    return [row["question"] for piece in pieces for _, row in sources.read(piece, ["question", "answer"])]


def test_what_a_split_forgets_is_evaluated_as_the_forget_set(tmp_path: Path) -> None:
    rows = [{"question": f"q{number}", "answer": "a"} for number in range(40)]
    data = DataConfig(retain=lines(tmp_path / "all.jsonl", rows), split=SplitConfig(share=0.2))
    config = UnlearnConfig(data=data)
    sets = read_sets(config.evaluation, config.data, config.model)
    asked = {name: [row["question"] for row in sets[name]] for name in ("forget", "retain")}
    assert asked == {name: texts_of(data.sources[name]) for name in asked}
    assert 0 < len(asked["forget"]) < 40
    assert not {*asked["forget"]} & {*asked["retain"]}


def test_a_split_by_class_reads_the_class_of_texts(tmp_path: Path) -> None:
    """Parquet: encoders of texts ask for other columns only."""
    rows = [{"question": f"q{number}", "answer": "a", "person": number // 4} for number in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    split, images = SplitConfig(classes=["1"]), ImagesConfig(label="person")
    source = SourceConfig(path=str(tmp_path / "all.parquet"))
    data = DataConfig(retain=source, split=split, images=images)
    assert texts_of(data.sources["forget"]) == ["q4", "q5", "q6", "q7"]
    left = [f"q{number}" for number in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert texts_of(data.sources["retain"]) == left
    assert texts_of(TrainDataConfig(train=source, split=split, images=images).source) == left


def test_a_split_by_class_refuses_rows_without_one(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": "q", "answer": "a", "person": 1}, {"question": SECRET, "answer": "a", "person": None}]
    data = DataConfig(retain=lines(tmp_path / "all.jsonl", [*rows, {"question": SECRET, "answer": "a"}]))
    data = dataclasses.replace(data, split=SplitConfig(classes=[1]), images=ImagesConfig(label="person"))
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, tokenizer, data)
    assert "null in column 'person', which data.split needs (all.jsonl row 2)" in str(caught.value)
    assert "no column 'person' for data.split, only answer, question. Set --data.images.label" in str(caught.value)
    assert SECRET not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- windows


@pytest.mark.slow
@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    max_length=st.integers(3, 40),
    stride=st.none() | st.integers(1, 39),
    packed=st.booleans(),
)
def test_every_token_has_its_loss_in_exactly_one_window(
    sizes: list[int], max_length: int, stride: int | None, packed: bool
) -> None:
    if stride is not None and stride >= max_length:
        stride = None
    tokenizer = tiny_tokenizer()
    texts = [" ".join(f"{document}x{word}" for word in range(size)) for document, size in enumerate(sizes)]
    form = FormatConfig(kind="text", max_length=max_length, stride=stride, packed=packed)
    encoder = StreamEncoders.of(tokenizer, form, {"forget": "text"}).stream("forget")
    windows = [row for _, row in encoder.encode([("row", {"text": text}) for text in texts], Problems())]
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    losses: list[int] = []
    for window in windows:
        ids, context = window.payload
        assert len(ids) == window.length <= max_length
        assert ids[0] == tokenizer.bos_token_id
        before = context - 1  # without BOS: repeats the tokens before the new ones
        assert ids[1:context] == (losses[-before:] if before else [])
        losses += ids[context:]
    assert losses == [token for document in expected for token in document]


@pytest.mark.slow
def test_ten_thousand_documents_of_uneven_length(tmp_path: Path, tokenizer: Any) -> None:
    """All their tokens are in the plan once an epoch, in the same batches for 1, 2 and 4 workers."""
    texts = documents(10_000)
    form = FormatConfig(kind="text", max_length=32)
    data = DataConfig(
        forget=lines(tmp_path / "f.jsonl", [{"text": text} for text in texts]),
        retain=lines(tmp_path / "r.jsonl", [{"text": text} for text in documents(50, seed=1)]),
        format=form,
    )
    prepared = prepare(tmp_path, tokenizer, data)
    rows = rows_of(prepared, "forget")
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    expected = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    found = [token for row in rows for token in row["input_ids"][row["prompt_tokens"] :]]
    assert found == expected
    assert len({row["row_id"] for row in rows}) == len(rows) > len(texts)
    assert prepared.report.streams["forget"].label_tokens == len(expected)
    batches = []
    for workers in (1, 2, 4):
        plan = write_plan(
            prepared.streams, str(tmp_path / f"plan{workers}"), batches_per_round={"forget": 1, "retain": 1}, rounds=12,
            batch_size=8, workers=workers, seed=3, here=True,
        )  # fmt: skip
        shards = [list(local_rounds(plan, shard, collate=padded(0))) for shard in range(workers)]
        batches.append([
            {name: sorted(row for shard in shards for row in shard[number][name][0].row_ids) for name in plan.streams}
            for number in range(plan.rounds)
        ])  # fmt: skip
    assert batches[0] == batches[1] == batches[2]


def test_passages_are_the_document_again(tokenizer: Any) -> None:
    text = " ".join(documents(30, seed=2))
    layout = TextLayout(tokenizer, FormatConfig(kind="text", max_length=20))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    passages = list(layout.passages(text))
    assert [ends for *_, ends in passages] == [False] * (len(passages) - 1) + [True]
    at = 0
    for number, (first, second, ends) in enumerate(passages):
        tokens, start = layout.passage(first, second, ends=ends)
        assert tokens[0] == tokenizer.bos_token_id
        assert 1 < start < len(tokens) <= 20
        if number + 1 < len(passages):  # the last one reaches back
            assert tokens[1:] == ids[at : at + 19]  # the window, and the token that follows it
            at += 18
        else:
            assert tokens[1:] == [*ids[-18:], tokenizer.eos_token_id]
    foreign = "Ægir – 日本語 und mehr"  # windows may end inside a character of several tokens
    text = "".join(
        first + second for first, second, _ in TextLayout(tokenizer, FormatConfig(max_length=9)).passages(foreign)
    )
    assert set(text) == set(foreign)


# ----------------------------------------------------------------------------------------------------------- checks


def test_a_document_in_both_sets_is_found_in_all_its_windows(tmp_path: Path, tokenizer: Any) -> None:
    shared = documents(1, seed=7)[0] + " common words" * 30
    forget = [{"text": shared}, {"text": "only here"}]
    retain = [{"text": "other words"}, {"text": shared.upper().replace(" ", "  ")}, {"text": shared}]
    data = DataConfig(
        forget=lines(tmp_path / "f.jsonl", forget),
        retain=lines(tmp_path / "r.jsonl", retain),
        format=FormatConfig(kind="text", max_length=32),
    )
    with pytest.raises(UserError, match=r"rows? also in data\.forget") as caught:
        prepare(tmp_path, tokenizer, data)
    assert "retain-2.1" in str(caught.value)
    assert "common" not in str(caught.value)
    dropped = prepare(tmp_path, tokenizer, apply_overrides(data, {"overlap": "drop"}))
    kept = prepared_ids(dropped, "retain")
    # the copy in capitals has more tokens, so more windows than the original to compare them with
    assert "retain-1.1" in kept
    assert not any(row.startswith("retain-3") for row in kept)
    assert prepare(tmp_path, tokenizer, apply_overrides(data, {"overlap": "allow"})).report.overlap is not None
    packed = apply_overrides(data, {"format.packed": True})
    with pytest.raises(UserError, match=r"rows? also in data\.forget"):
        prepare(tmp_path, tokenizer, packed)
    with pytest.raises(UserError, match=r"data\.format\.packed"):
        apply_overrides(packed, {"overlap": "drop"})


def prepared_ids(prepared: PreparedData, name: str) -> list[str]:
    rows = rows_of(prepared, name)
    return [rows[index]["row_id"] for index in prepared.streams[name].all_rows()]


MISTAKES: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "no content": ({}, [{"text": SECRET}, {"text": " \n"}], "1 row: empty text in column 'text' (f.jsonl row 2)"),
    "only short ones": ({"format.min_characters": 50}, [{"text": SECRET}], "every row is shorter than data.format."),
    "missing column": (
        {}, [{"content": SECRET}], "no column 'text', only content. Set --data.format.text (f.jsonl row 1)"
    ),
    "not text": ({}, [{"text": 3}], "int instead of text in column 'text' (f.jsonl row 1)"),
    "no assistant": (
        {"format.kind": "messages"}, [{"messages": [{"role": "user", "content": SECRET}]}],
        "no turn of the assistant (f.jsonl row 1)",
    ),
    "nothing to answer": (
        {"format.kind": "messages"}, [{"conversations": [{"from": "gpt", "value": SECRET}]}],
        "the first turn is the assistant's, so it answers nothing: remove it, or put a turn before (f.jsonl row 1)",
    ),
    "an empty turn": (
        {"format.kind": "messages"},
        [{"messages": [{"role": "user", "content": SECRET}, {"role": "assistant", "content": ""}]}],
        "turn 2 of 'messages' has no text (f.jsonl row 1)",
    ),
    "no turns": ({"format.kind": "messages"}, [{"messages": SECRET}], "str instead of a list of turns"),
    "no chat": ({"format.kind": "messages"}, [{"question": SECRET}], "no column 'messages', only question. Set --data"),
    "longer than a row": (
        {"format.kind": "qa"}, [{"question": "q", "answer": f"{SECRET} " * 40}],
        "data.forget: 1 row longer than data.format.max_length (forget-1): 217 tokens would not be forgotten; raise "
        "it, or --data.truncate allow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_row_and_remedy_but_no_text(name: str, tmp_path: Path, chat_tokenizer: Any) -> None:
    changes, rows, said = MISTAKES[name]
    source = lines(tmp_path / "f.jsonl", rows)
    retain = lines(tmp_path / "r.jsonl", [{"question": "q", "answer": "a"}])
    data = DataConfig(
        forget=source,
        retain=SourceConfig(path=retain.path, kind="qa"),
        format=FormatConfig(
            kind="text", max_length=32, template="qa" if changes.get("format.kind") == "qa" else "auto"
        ),
    )
    data = apply_overrides(data, changes)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, chat_tokenizer, data)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
    if name == "longer than a row":
        allowed = prepare(tmp_path, chat_tokenizer, apply_overrides(data, {"truncate": "allow"}))
        assert allowed.report.streams["forget"].truncated_rows == 1


def test_chats_need_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.format\.kind = messages needs the tokenizer's chat template"):
        StreamEncoders.of(tokenizer, FormatConfig(), {"forget": "messages"})


def test_new_options_change_no_hash() -> None:
    """Those of a run from before they existed."""
    assert outcome_hash(UnlearnConfig()) == outcome_hash(
        apply_overrides(UnlearnConfig(), {"data.truncate": "allow", "data.format.kind": "qa"})
    )
    texts = apply_overrides(UnlearnConfig(), {"data.format.kind": "text"})
    assert outcome_hash(texts) != outcome_hash(apply_overrides(texts, {"data.retain.kind": "qa"}))
    for changes in ({"data.format.kind": "text"}, {"data.retain.kind": "text"}, {"data.format.stride": 8}):
        assert outcome_hash(apply_overrides(UnlearnConfig(), changes)) != outcome_hash(UnlearnConfig())


# ------------------------------------------------------------------------------------------------------------ chats

USER, FIRST, SECOND = "who is person 1?", "the answer is long", "person 2"
TURNS = [
    {"role": "user", "content": USER}, {"role": "assistant", "content": FIRST},
    {"role": "user", "content": "and 2?"}, {"role": "assistant", "content": SECOND},
]  # fmt: skip
CHATS = {
    "messages": ({"messages": TURNS}, 2),
    "sharegpt": (
        {"conversations": [
            {"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in TURNS
        ]},
        2,
    ),
    "trl": ({"prompt": TURNS[:3], "completion": TURNS[3:]}, 1),
    "parts": ({"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]}, 2),
}  # fmt: skip


@pytest.mark.parametrize("shape", CHATS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_assistants_turns_have_a_loss(shape: str, suffix: str, tmp_path: Path, chat_tokenizer: Any) -> None:
    row, turns = CHATS[shape]
    path = tmp_path / f"f.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        lines(path, [row])
    data = DataConfig(
        forget=SourceConfig(path=str(path)),
        retain=SourceConfig(path=lines(tmp_path / "r.jsonl", [{"text": "a text"}]).path, kind="text"),
        format=FormatConfig(kind="messages"),
    )
    prepared = prepare(tmp_path, chat_tokenizer, data)
    rows = rows_of(prepared, "forget")
    assert [each["row_id"] for each in rows] == [f"forget-1.{number}" for number in range(1, turns + 1)]
    whole = chat_tokenizer.apply_chat_template(TURNS, tokenize=False)
    for each, answer in zip(rows, (FIRST, SECOND)[-turns:], strict=True):
        ids, at = each["input_ids"], each["prompt_tokens"]
        prompt, loss = chat_tokenizer.decode(ids[:at]), chat_tokenizer.decode(ids[at:])
        assert loss == answer + "</s>"
        assert prompt == "<s>" + whole[: whole.index(answer)]
    (text,) = rows_of(prepared, "retain")
    assert chat_tokenizer.decode(text["input_ids"]) == "<s>a text</s>"


def test_evaluation_rows_of_chats_and_documents(tmp_path: Path, tokenizer: Any) -> None:
    chats = lines(tmp_path / "c.jsonl", [{"messages": TURNS}, {"messages": TURNS[:2]}])
    rows = evaluation_rows(chats, None, name="forget", kind="messages")
    assert [(row["row_id"], row["answer"], row["cluster"]) for row in rows] == [
        ("forget-1.1", FIRST, "0"), ("forget-1.2", SECOND, "0"), ("forget-2.1", FIRST, "1"),
    ]  # fmt: skip
    form = FormatConfig(kind="text", max_length=16)
    texts = lines(tmp_path / "t.jsonl", [{"text": "word " * 40}, {"text": "few words"}])
    rows = evaluation_rows(
        texts, None, 3, name="forget", kind="text", fmt=form, layout=lambda: TextLayout(tokenizer, form)
    )
    assert [row["row_id"] for row in rows] == ["forget-1.1", "forget-1.2", "forget-1.3"]
    questions = lines(tmp_path / "q.jsonl", [{"question": "q", "answer": "a"}])
    (row,) = evaluation_rows(questions, None, fmt=form, kind=None)  # questions about documents
    assert row == {"row_id": "evaluation-1", "question": "q", "answer": "a"}


# ------------------------------------------------------------------------------------------------------ shapes of files

ROWS = [{"question": "q, 1", "answer": 'a "1"'}, {"question": "q\n2", "answer": "42"}]


def _csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_shape(shape: str, folder: Path) -> str:
    path = folder / f"rows.{shape}"
    if shape in ("csv", "tsv"):
        _csv(path, "," if shape == "csv" else "\t")
    elif shape == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif shape == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif shape == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("shape", ["csv", "tsv", "jsonl.gz", "json", "saved", "saved_splits"])
def test_shapes_of_files(shape: str, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    source = SourceConfig(path=write_shape(shape, tmp_path))
    pieces = sources.fragments(source, None, stream="forget", option="data.forget")
    assert [(number, row) for piece in pieces for number, row in sources.read(piece)] == list(enumerate(ROWS, start=1))


def test_an_array_may_follow_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n \n" + json.dumps(ROWS, indent=1))
    assert [row["answer"] for row in evaluation_rows(str(path), None)] == ['a "1"', "42"]


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    pieces = sources.fragments(SourceConfig(path=str(tmp_path)), None, stream="forget", option="data.forget")
    first, second = [row for piece in pieces for row in sources.read(piece)]
    assert first == (1, {"text": "one\n\ntwo"})
    assert second == (1, sources.UnreadableRow("not UTF-8"))


BROKEN = {
    "cells.csv": ("question,answer\nq,a,b\nq,a\n", "more cells than the first line has columns (cells.csv row 1)"),
    "quotes.csv": ('question,answer\nq,"a\n', "broken quotes; the rest of the file was not read (quotes.csv row 1)"),
    "half.json": ('[{"question": "q"}', "not JSON (the file starts an array that cannot be read to its end)"),
    "numbers.json": ("[1, 2]", "2 rows: not a JSON object (numbers.json row 1, numbers.json row 2)"),
    "digits.jsonl": (f'{{"question": "q", "answer": "a", "id": {"1" * 5000}}}', "not JSON (one object per line"),
    "digits.json": (f'[{{"question": "q", "answer": "a", "id": {"1" * 5000}}}]', "not JSON (the file starts an array"),
    "cut.jsonl.gz": (gzip.compress(b'{"question": "q", "answer": "a"}\n' * 99)[:40], "cannot be decompressed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, tmp_path: Path, tokenizer: Any) -> None:
    content, said = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    retain = lines(tmp_path / "r.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, tokenizer, DataConfig(forget=SourceConfig(path=str(path)), retain=retain))
    assert said in str(caught.value)


def test_a_hub_name_with_configuration_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "set" / "few"
    folder.mkdir(parents=True)
    lines(folder / "test.jsonl", ROWS)
    configs = [{"config_name": "few", "data_files": [{"split": "test", "path": "few/test.jsonl"}]}]
    (tmp_path / "owner" / "set" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    monkeypatch.chdir(tmp_path)
    assert [row["answer"] for row in evaluation_rows("owner/set:few:test", None)] == ['a "1"', "42"]
    with pytest.raises(UserError, match=r"hub_config = many, .*hub_split = train"):
        evaluation_rows("owner/set:many", None)
