"""Fragments and evaluation rows, as far as they need no Ray."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ofmu_ray.config import SourceConfig
from ofmu_ray.data import sources
from ofmu_ray.data.evaluation_rows import evaluation_rows
from ofmu_ray.errors import UserError


def jsonl(path: Path, rows: list[dict], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


def ids(source: SourceConfig, root: Path | None = None) -> list[str]:
    pieces = sources.fragments(source, None if root is None else str(root), stream="forget", option="data.forget")
    return [piece.row_id(number) for piece in pieces for number, _ in sources.read(piece, ["question", "answer"])]


ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]


def test_last_line_without_newline_and_blank_lines(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.json", ROWS, end="")
    (tmp_path / "b.jsonl").write_text('\n{"question": "é", "answer": "a"}\r\n\n{"question": "q", "answer": "b"}')
    assert ids(SourceConfig(path="a.json"), tmp_path) == [f"forget-{i}" for i in range(1, 6)]
    assert ids(SourceConfig(path="b.jsonl"), tmp_path) == ["forget-2", "forget-4"]  # numbers of the lines


def test_row_groups_folders_globs_and_limits_number_rows_alike(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet", row_group_size=2)
    one = [f"forget-{i}" for i in range(1, 6)]
    assert ids(SourceConfig(path="p.parquet"), tmp_path) == one
    assert ids(SourceConfig(path="p.parquet", limit=3), tmp_path) == one[:3]
    jsonl(tmp_path / "many" / "x" / "b.jsonl", ROWS[:2])
    jsonl(tmp_path / "many" / "a.jsonl", ROWS[:3])
    jsonl(tmp_path / "many" / ".hidden.jsonl", ROWS)
    jsonl(tmp_path / "many" / ".ipynb_checkpoints" / "a-checkpoint.jsonl", ROWS)
    jsonl(tmp_path / "many" / "_temporary" / "0" / "a.jsonl", ROWS)
    many = ["forget-1-1", "forget-1-2", "forget-1-3", "forget-2-1", "forget-2-2"]
    assert ids(SourceConfig(path="many"), tmp_path) == many
    assert ids(SourceConfig(path=str(tmp_path / "many" / "*.jsonl"))) == many
    assert ids(SourceConfig(path="many", limit=4), tmp_path) == many[:4]
    jsonl(tmp_path / "rows [1].jsonl", ROWS)  # as browsers name a second download
    assert ids(SourceConfig(path="rows [1].jsonl"), tmp_path) == one


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return sources.fingerprint(
            sources.fragments(SourceConfig(path=str(path)), None, stream="forget", option="data.forget")
        )

    first = fingerprint(jsonl(tmp_path / "a.jsonl", ROWS))
    assert fingerprint(jsonl(tmp_path / "b" / "other.jsonl", ROWS)) == first
    assert fingerprint(jsonl(tmp_path / "c.jsonl", ROWS[:4])) != first


def test_hub_data_set_from_a_local_script_free_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "owner" / "set" / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    source = SourceConfig(path="owner/set", format="hub", hub_split="train[:3]")
    pieces = sources.fragments(source, None, stream="forget", option="data.forget")
    assert [row for piece in pieces for _, row in sources.read(piece)] == ROWS[:3]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (SourceConfig(path=None), "data.forget.path is not set"),
        (SourceConfig(path="missing.jsonl"), "no such file"),
        (SourceConfig(path="nobody/nothing"), "neither a file or folder here nor a hub data set"),
        (SourceConfig(path="x.rows"), "--data.forget.format to one of json, csv, tsv, text, parquet"),
        (SourceConfig(path="x.csv", format="parquet"), "not a Parquet file"),
        (SourceConfig(path="sftp://host/x.jsonl"), "not a location"),
    ],
)
def test_mistakes_name_option_and_remedy(
    source: SourceConfig, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.csv", "x.rows"):
        (tmp_path / name).write_text("question,answer\n")
    with pytest.raises(UserError, match=said):
        sources.fragments(source, None, stream="forget", option="data.forget")


def test_evaluation_rows(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c", "d"], "other": 1}
    path = jsonl(tmp_path / "e.json", [row, row], end="")
    rows = evaluation_rows("e.json", str(tmp_path), None, name="forget")
    assert rows == [{"row_id": f"forget-{i}", **{k: v for k, v in row.items() if k != "other"}} for i in (1, 2)]
    assert len(evaluation_rows(str(path), None, 1)) == 1
    plain = jsonl(tmp_path / "plain.jsonl", ROWS)
    assert evaluation_rows(str(plain), None)[0] == {"row_id": "evaluation-1", **ROWS[0]}


def test_evaluation_rows_tell_every_problem_without_text(tmp_path: Path) -> None:
    rows = [
        {"question": "SECRET", "answer": "SECRET", "perturbed_answer": ["c"], "paraphrased_answer": "p"},
        {"question": "SECRET", "answer": "", "perturbed_answer": "SECRET", "paraphrased_answer": "p"},
        {"question": "SECRET", "answer": "SECRET", "perturbed_answer": ["c"]},
    ]
    path = jsonl(tmp_path / "e.jsonl", rows)
    with pytest.raises(UserError) as caught:
        evaluation_rows(str(path), None, option="evaluation.sets.forget")
    text = str(caught.value)
    assert "evaluation.sets.forget" in text
    assert "empty text in column 'answer' (row 2)" in text
    assert "'perturbed_answer' is not a list of texts (row 2)" in text
    assert "no column 'paraphrased_answer'" in text
    assert "SECRET" not in text


def test_tofu_evaluation_sets_pass(shared_dir: Path) -> None:
    counts = {
        name: len(evaluation_rows(f"{name}_perturbed.json", str(shared_dir / "data" / "tofu"), None, name=name))
        for name in ("forget10", "retain", "real_authors", "world_facts")
    }
    assert counts == {"forget10": 400, "retain": 400, "real_authors": 100, "world_facts": 117}
