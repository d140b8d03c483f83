"""OpenUnlearning's names and conventions, against its definitions row by row (the formulas of docs/metrics.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any

import pyarrow as pa
import pytest

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.evaluation.rows import MEASURED, with_row_metrics
from ofmu_ray.metrics.peer_names import SMALL, peer_values
from ofmu_ray.metrics.summary import summarise
from pipelines import cli
from pipelines.evaluate import peer_table

SETS = {"forget": 4, "retain": 4, "real_authors": 3, "world_facts": 3, "holdout": 4}


def record(name: str, index: int) -> dict[str, Any]:
    """A row with values that differ everywhere; the last forget row has an answer of one wrong token."""
    tokens = 1 if (name, index) == ("forget", 3) else 4 + index
    short = {"answer_logprobs": [-0.3 * (1 + (index + t) % 3) for t in range(tokens + 1)]}
    options = name in ("real_authors", "world_facts")
    return short | {
        "row_id": f"{name}-{index}",
        "set": name,
        "index": index,
        "answer_nll": 0.5 + 0.1 * index + len(name) / 50,
        "answer_tokens": tokens + 1,
        "paraphrase_nll": None if options else 0.9 + 0.2 * index,
        "wrong_nll": [1.0 + 0.1 * index, 1.5, 2.0][: 3 if options else 2],
        "rouge_l_recall": 0.2 + 0.1 * index,
        "answer_matches": [*([False] if tokens == 1 else [False] * 4 + [True] * index), True],
        "answer_zscores": [-0.1 * t for t in range(tokens + 1)],
        "answer_zlib_bytes": 20 + index,
        "kind": "qa",
    }


def table() -> pa.Table:
    rows = [record(name, index) for name, count in SETS.items() for index in range(count)]
    return with_row_metrics(pa.Table.from_pylist(rows, schema=MEASURED))


def of(name: str) -> list[dict[str, Any]]:
    return [record(name, index) for index in range(SETS[name])]


def ratio(row: dict[str, Any]) -> float:
    right = row["answer_nll"] if row["paraphrase_nll"] is None else row["paraphrase_nll"]
    return math.exp(-mean(row["wrong_nll"])) / (math.exp(-right) + SMALL)


def test_values_follow_the_peers_definitions() -> None:
    rows = table()
    results = {name: value.to_json() for name, value in summarise(rows, rows, bootstrap_samples=20).items()}
    found = peer_values(rows, results)
    expected = {
        "forget_Q_A_Prob": mean(math.exp(-row["answer_nll"]) for row in of("forget")),
        "forget_Q_A_PARA_Prob": mean(math.exp(-row["paraphrase_nll"]) for row in of("forget")),
        "retain_Q_A_PERT_Prob": mean(mean(math.exp(-nll) for nll in row["wrong_nll"]) for row in of("retain")),
        "forget_Q_A_ROUGE": mean(row["rouge_l_recall"] for row in of("forget")),
        "forget_truth_ratio": mean(min(ratio(row), 1 / (ratio(row) + SMALL)) for row in of("forget")),
        "wf_Truth_Ratio": mean(max(0, 1 - ratio(row)) for row in of("world_facts")),
        "ra_Q_A_Prob": mean(math.exp(-row["answer_nll"]) for row in of("real_authors")),
        "ra_Q_A_Prob_normalised": mean(
            math.exp(-row["answer_nll"])
            / (math.exp(-row["answer_nll"]) + sum(math.exp(-nll) for nll in row["wrong_nll"]) + SMALL)
            for row in of("real_authors")
        ),
        # matches at the end: 0 of 4, 1 of 5, 2 of 6, 0 of 1: never below one
        "extraction_strength": mean([1 / 4, 1 / 5, 2 / 6, 1 / 1]),
        "exact_memorization": mean([0 / 4, 1 / 5, 2 / 6, 0 / 1]),
        "forget_quality": 1.0,
        "privleak": 0.0,
    }
    parts = ["retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"]
    parts += [f"{peer}_{score}" for peer in ("retain", "ra", "wf") for score in ("Q_A_ROUGE", "Truth_Ratio")]
    expected["model_utility"] = harmonic_mean([found[name] or 0.0 for name in parts])
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert found["mia_gradnorm"] is None, "it was not measured"
    assert {name for name in found if name.startswith("mia_")} >= {"mia_min_k", "mia_min_k_plus_plus", "mia_loss"}
    assert results["forget_extraction_strength"]["value"] == pytest.approx(mean([0, 1 / 5, 2 / 6, 0])), "ours has none"


def test_what_the_rows_do_not_give_is_none() -> None:
    plain = [record("forget", index) | {"wrong_nll": None, "paraphrase_nll": None} for index in range(3)]
    found = peer_values(with_row_metrics(pa.Table.from_pylist(plain, schema=MEASURED)), {})
    assert found["forget_Q_A_Prob"] is not None
    missing = ("forget_truth_ratio", "forget_Q_A_PERT_Prob", "retain_Q_A_Prob", "model_utility", "privleak")
    assert [found[name] for name in missing] == [None] * 5


def test_the_option_and_its_table(tmp_path: Path) -> None:
    assert parse(EvaluateConfig, ["--peer-names"], "x").peer_names
    text = peer_table({"target": {"forget_Q_A_Prob": 0.98765, "privleak": None}, "retrained": {"forget_Q_A_Prob": 0.1}})
    assert [line.split() for line in text.splitlines()] == [
        ["OpenUnlearning's", "name", "target", "retrained"],
        ["forget_Q_A_Prob", "0.9877", "0.1"],
    ]


@pytest.mark.slow
def test_a_small_evaluation_needs_no_ray_and_its_cache_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    from ofmu_ray.cluster import connect
    from ofmu_ray.evaluation.actors import Loading

    ray.shutdown()  # another file's

    def never(*_: object) -> None:
        raise AssertionError("not needed")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connect, "_start", never)
    words = [
        "evaluate",
        "--name",
        "e",
        "--storage",
        str(tmp_path),
        "--peer-names",
        "--tracking.system_metrics",
        "false",
    ]
    words += ["--evaluation.max_rows", "4", "--evaluation.max_new_tokens", "4", "--evaluation.bootstrap_samples", "20"]
    assert cli.main(words) == 0
    first = (tmp_path / "e/peer_names.json").read_text()
    values = json.loads(first)
    assert values["retrained"]["forget_quality"] == 1.0
    assert values["target"]["forget_Q_A_Prob"] > values["retrained"]["forget_Q_A_Prob"]
    assert "forget_Q_A_Prob" in capsys.readouterr().out
    monkeypatch.setattr(Loading, "scorer", never)
    assert cli.main(words) == 0
    assert (tmp_path / "e/peer_names.json").read_text() == first
