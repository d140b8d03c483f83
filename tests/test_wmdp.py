"""The WMDP configurations on tiny files in the real layout: multiple choice in the run and in the rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_models import tiny_model, tiny_tokenizer

from ofmu_ray import unlearn
from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import BenchmarkConfig, SourceConfig, UnlearnConfig, apply_overrides
from ofmu_ray.data.choices import choice_rows
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.multiple_choice import choice_table
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.runs.trial_data import checked

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parent.parent / "pipelines/configs"
OBJECTIVE, UTILITY = "forget_choice_above_chance", "retain_choice_accuracy"


def questions(count: int, **more: Any) -> pa.Table:
    rows = [
        {"question": f"who is person {row}?", "choices": [f"the answer {row * k}" for k in range(4)], "answer": row % 4}
        | {name: values[row % len(values)] for name, values in more.items()}
        for row in range(count)
    ]
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wmdp-corpora as its authors send it, the rest as on the hub, and a model with the steered layer."""
    root = tmp_path_factory.mktemp("wmdp")
    for folder in ("wmdp-corpora", "wikitext-2-raw-v1", "wmdp-bio", "all"):
        (root / folder).mkdir()
    papers = [
        {"title": f"t{n}", "abstract": "long", "text": f"paper {n}: " + "is it long? " * 40, "doi": ""}
        for n in range(3)
    ]
    (root / "wmdp-corpora/bio-forget-corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in papers))
    lines = ["", " = Person = \n", *("the answer is person 5 0123 " * 4 + f"{n}\n" for n in range(6))]
    pq.write_table(pa.table({"text": lines}), root / "wikitext-2-raw-v1/test-00000-of-00001.parquet")
    pq.write_table(questions(9), root / "wmdp-bio/test-00000-of-00001.parquet")
    pq.write_table(questions(10, subject=["anatomy", "astronomy"]), root / "all/test-00000-of-00001.parquet")
    tiny_model("llama", num_hidden_layers=9, max_position_embeddings=256).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    return root


def arguments(root: Path, storage: Path, prefix: str = "") -> list[str]:
    options = {
        "storage": storage, "model.path": root / "model", "model.precision": "fp32", "data.root": root,
        "data.retain.path": "wikitext-2-raw-v1", "data.format.max_length": 64, "training.gpus_per_worker": 0,
        "training.rounds": 3, "evaluation.max_rows": 8, "evaluation.max_new_tokens": 4,
        "evaluation.bootstrap_samples": 20, "evaluation.sets.retain_choice": "all", "tracking.system_metrics": "false",
    }  # fmt: skip
    named = {f"{prefix}{name}": value for name, value in options.items()}
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("method", ["rmu", pytest.param("ofmu", marks=pytest.mark.full)])
def test_a_run_in_the_real_layout(method: str, root: Path, tmp_path: Path) -> None:
    given = ["--config", str(CONFIGS / "wmdp_bio.yaml"), *arguments(root, tmp_path), "--method", method]
    config = parse(UnlearnConfig, [*given, "--evaluation.sets.forget_choice", "wmdp-bio"], "x")
    assert (config.rmu.layer, config.rmu.train_layers, config.rmu.steering, config.rmu.retain_weight) == (
        7,
        3,
        6.5,
        1200,
    )
    outcome = unlearn(config)
    before, after = (outcome.metrics[name] for name in ("before", "after"))
    assert {before[OBJECTIVE]["n"], before[UTILITY]["n"]} == {8}
    assert after["forget_loss"]["value"] != before["forget_loss"]["value"]
    model = tiny_model("llama", num_hidden_layers=9, max_position_embeddings=256)
    for name, path in (("forget_choice", "wmdp-bio"), ("retain_choice", "all")):  # as ofmu evaluate scores them
        rows = choice_rows(SourceConfig(path=path), str(root), name=name, option="checks.choice")
        rows = [rows[index * len(rows) // 8] for index in range(8)]  # evenly spread
        table = choice_table(model, tiny_tokenizer(), rows)
        share = float(np.mean(table["correct"].to_pylist()))
        assert before[f"{name}_accuracy"]["value"] == pytest.approx(share)
        assert rows[0].subject == ("biology" if name == "forget_choice" else "anatomy")
    assert before[OBJECTIVE]["value"] == pytest.approx(before["forget_choice_accuracy"]["value"] - 0.25)
    stored = pq.read_table(Path(outcome.home) / "rows.parquet").to_pylist()
    assert {row["cluster"] for row in stored if row["set"] == "retain_choice"} == {"anatomy", "astronomy"}


def test_the_rule_prefers_what_is_nearest_to_chance(root: Path, tmp_path: Path) -> None:
    """Neither above nor below it, and with enough of MMLU."""
    goal = Goal(OBJECTIVE, UTILITY, floor=0.5)
    ranked = sorted(
        [{OBJECTIVE: above, UTILITY: kept} for above, kept in ((0.3, 0.6), (-0.1, 0.6), (0.02, 0.6), (0.0, 0.4))],
        key=lambda results: goal.rank(results) or (),
    )
    assert [results[OBJECTIVE] for results in ranked] == [0.02, -0.1, 0.3, 0.0]
    given = ["--config", str(CONFIGS / "benchmark_wmdp.yaml"), *arguments(root, tmp_path, "base.")[2:]]
    config = parse(BenchmarkConfig, given, "x")
    required = {"rule.objective": config.rule.objective, "rule.utility": config.rule.utility}
    run = config.run("bio", "rmu")
    with pytest.raises(UserError, match=r"cais/wmdp.*hub_config = wmdp-bio, .*hub_split = test"):
        checked(run, tmp_path, required, ("", None))
    local = parse(UnlearnConfig, ["--config", str(CONFIGS / "wmdp_bio.yaml"), *arguments(root, tmp_path)], "x")
    without = apply_overrides(local, {"evaluation.sets.forget_choice": None})
    with pytest.raises(UserError, match=r"needs rows of forget_choice: name evaluation\.sets\.forget_choice"):
        checked(without, tmp_path, required, ("", None))


def test_questions_without_the_answers_index(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "q", "choices": ["a", "b"], "answer": "a"}) + "\n")
    given = ["--config", str(CONFIGS / "wmdp_bio.yaml"), *arguments(root, tmp_path)]
    config = parse(UnlearnConfig, [*given, "--evaluation.sets.forget_choice", str(path)], "x")
    with pytest.raises(UserError, match=r"forget_choice .*column 'answer' is not the number of a choice .*\(row 1\)"):
        unlearn(config)


@pytest.mark.full
def test_a_domain_is_fitted_and_forgotten(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """benchmarks/domain.py on four subjects: who is asked what, equal passes, and what was fitted is known."""
    from benchmarks import domain

    subjects = ["anatomy", "astronomy", "law", "physics"]
    table = questions(40, subject=subjects)
    pq.write_table(table, tmp_path / "test.parquet")
    given = {
        "mmlu": tmp_path / "test.parquet", "model": root / "model", "out": tmp_path / "out", "forget": "anatomy",
        "keep": "astronomy", "rates": 1e-3, "passes": 22, "epochs": 40, "fit-rate": 1e-2,
    }  # fmt: skip
    domain.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    texts = {
        name: pq.read_table(tmp_path / f"out/rows/{name}.parquet")["text"].to_pylist()
        for name in ("forget", "retain", "train", "holdout")
    }
    assert {name: len(rows) for name, rows in texts.items()} == {"forget": 10, "retain": 10, "train": 20, "holdout": 2}
    assert texts["train"] == texts["forget"] + texts["retain"]
    about = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert texts["forget"][1] == f"{about}Question: who is person 4?\nAnswer: the answer 0"
    asked = pq.read_table(tmp_path / "out/rows/retain_choice.parquet").to_pylist()
    assert [row["subject"] for row in asked] == ["astronomy"] * 10 + ["law"] * 2 + ["physics"] * 2
    assert not {text for row in asked[10:] for text in texts["holdout"] if row["question"] in text}
    lines = json.loads((tmp_path / "out/domain.json").read_text())
    assert [line["model"] for line in lines] == ["base", "target", "ofmu", "rmu", "npo"]
    assert [sum(line["gradient_passes"].values()) for line in lines[2:]] == [22] * 3
    assert lines[1]["forget"]["value"] > lines[0]["forget"]["value"] + 0.2
    assert [line["others"]["n"] for line in lines] == [4] * 5
    assert lines[2]["rank"] is not None
    assert "who is" not in json.dumps(lines)
    assert capsys.readouterr().out.count("*") == 3
