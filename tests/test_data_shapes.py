"""The shapes of rows and files in docs/data.md: unlearn, evaluate with generations, export, load; on a tiny model."""

from __future__ import annotations

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
from test_text_data import CHATML

from ofmu_ray.config import DataConfig, FormatConfig, SourceConfig

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


def splits(path: Path, rows: Rows) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)


FILES: dict[str, Callable[[Path, Rows], Any]] = {
    "rows.jsonl": lines,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "rows.csv": table,
    "rows.tsv": table,
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "splits": splits,
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
