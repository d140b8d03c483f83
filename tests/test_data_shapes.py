"""The shapes of rows and files in docs/data.md: unlearn, evaluate with generations, export, load; on a tiny model."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from families import family_model, tiny_run
from hub_server import Hub
from test_text_data import CHATML

from ofmu_ray.config import DataConfig, EvaluationSetsConfig, FormatConfig, SourceConfig

pytestmark = [pytest.mark.slow, pytest.mark.full]

Rows = list[dict[str, Any]]
PAIRS = [(f"Who is person {number}?", f"The {number}th of the town, since 190{number}.") for number in range(6)]


def lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def text_of(rows: Rows) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def zstd(path: Path, rows: Rows) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(text_of(rows))


def folder(path: Path, rows: Rows) -> None:
    """Two files, and one further down."""
    (path / "more").mkdir(parents=True)
    for number, place in enumerate(["a.jsonl", "b.jsonl", "more/c.jsonl"]):
        lines(path / place, rows[number : number + 1])


def splits(path: Path, rows: Rows) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)


FILES: dict[str, Callable[[Path, Rows], Any]] = {
    "rows.jsonl": lines,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "rows.csv": table,
    "rows.tsv": table,
    "rows.ndjson": lines,
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(text_of(rows))),
    "rows.jsonl.bz2": lambda path, rows: path.write_bytes(bz2.compress(text_of(rows))),
    "rows.jsonl.zst": zstd,
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "splits": splits,
    "folder": folder,
    "*.jsonl": lambda path, rows: folder(path.parent, rows),
}
QUESTIONS = [{"question": question, "answer": answer} for question, answer in PAIRS]
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in PAIRS
]
SHAPES: dict[str, tuple[Rows, FormatConfig]] = {
    "questions": (QUESTIONS, FormatConfig()),
    "trl": (
        [{"prompt": question, "completion": answer} for question, answer in PAIRS],
        FormatConfig(question="prompt", answer="completion"),
    ),
    "documents": ([{"text": f"{q} {a} " * 4} for q, a in PAIRS], FormatConfig(kind="text", max_length=32)),
    "packed": ([{"text": f"{q} {a}"} for q, a in PAIRS], FormatConfig(kind="text", max_length=32, packed=True)),
    "messages": ([{"messages": chat} for chat in CHATS], FormatConfig(kind="messages")),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS],
        FormatConfig(kind="messages"),
    ),
    "trl_chats": ([{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS], FormatConfig(kind="messages")),
}


def check_run(folder: Path, name: str, rows: Rows, form: FormatConfig, tracked: str) -> None:
    sources = {}
    for stream, part in {"forget": rows[:3], "retain": rows[3:]}.items():
        (folder / stream).mkdir()
        path = folder / stream / name
        FILES[name](path, part)
        sources[stream] = SourceConfig(path=str(path))
    chat = CHATML if form.kind == "messages" else None
    outcome = tiny_run(folder, family_model("Llama"), DataConfig(**sources, format=form), tracked, chat)
    assert outcome.finished
    after = outcome.metrics["after"]
    for metric in ("forget_probability", "retain_probability", "forget_rouge", "forget_repetition"):
        assert 0 <= after[metric]["value"] <= 1, metric
    transformers.AutoModelForCausalLM.from_pretrained(outcome.model)


@pytest.mark.parametrize("name", FILES)
def test_a_run_on_every_kind_of_file(name: str, tmp_path: Path, tracked: str) -> None:
    check_run(tmp_path, name, QUESTIONS, FormatConfig(), tracked)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_on_every_shape_of_rows(shape: str, tmp_path: Path, tracked: str) -> None:
    check_run(tmp_path, "rows.jsonl", *SHAPES[shape], tracked)


def test_a_run_on_plain_texts(tmp_path: Path, tracked: str) -> None:
    for stream, part in {"forget": PAIRS[:3], "retain": PAIRS[3:]}.items():
        (tmp_path / stream).mkdir()
        for number, (question, answer) in enumerate(part):
            (tmp_path / stream / f"{number}.txt").write_text(f"{question} {answer} " * 4)
    sources = {stream: SourceConfig(path=str(tmp_path / stream)) for stream in ("forget", "retain")}
    form = FormatConfig(kind="text", max_length=32)
    outcome = tiny_run(tmp_path, family_model("Llama"), DataConfig(**sources, format=form), tracked)
    assert outcome.finished
    assert 0 <= outcome.metrics["after"]["forget_probability"]["value"] <= 1


def test_a_run_on_sets_of_the_hub_by_name(hub: Hub, tmp_path: Path, tracked: str) -> None:
    perturbed = [
        row | {"paraphrased_answer": f"Once: {row['answer']}", "perturbed_answer": [f"Not {row['answer']}"]}
        for row in QUESTIONS[:3]
    ]
    parts = {"forget10": QUESTIONS[:3], "retain90": QUESTIONS[3:], "forget10_perturbed": perturbed}
    described = [f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.json" for name in parts]
    card = "---\nconfigs:\n" + "\n".join(described) + "\n---\n"
    files = {f"sets/{name}.json": text_of(rows) for name, rows in parts.items()}
    hub.data_sets["someone/tofu"] = {"README.md": card.replace("path: ", "path: sets/").encode(), **files}
    named = {"forget": "someone/tofu:forget10", "retain": "someone/tofu:retain90:train"}
    sources = {stream: SourceConfig(path=name) for stream, name in named.items()}
    sets = EvaluationSetsConfig(forget="someone/tofu:forget10_perturbed")
    outcome = tiny_run(tmp_path, family_model("Llama"), DataConfig(**sources), tracked, sets=sets)
    assert outcome.finished
    assert outcome.metrics["after"]["forget_truth_ratio"]["n"] == 3, "the wrong answers of the evaluation set"
