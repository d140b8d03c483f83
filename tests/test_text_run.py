"""Runs on documents and chats, in this process: unlearn, evaluate, report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_models import tiny_model, tiny_tokenizer
from rouge_score.rouge_scorer import RougeScorer
from test_text_data import CHATML, SECRET, TURNS, lines

from ofmu_ray import unlearn
from ofmu_ray.attacks.alignment import alignment_texts, representations
from ofmu_ray.attacks.relearning import relearn
from ofmu_ray.config import (
    DataConfig,
    EvaluationConfig,
    FormatConfig,
    ModelConfig,
    SourceConfig,
    TrackingConfig,
    TrainingConfig,
    UnlearnConfig,
    apply_overrides,
)
from ofmu_ray.config.robustness import RelearnOptions
from ofmu_ray.data.template import Template
from ofmu_ray.data.windows import TextLayout
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.evaluation.rows import evaluation_rows

pytestmark = pytest.mark.slow

FORGET = [
    {"text": f"{SECRET} {word} " + "who is person 1 and the answer is long " * 8} for word in ("one", "two", "three")
]
RETAIN = [{"text": f"question {number}: " + "the answer is person 5 " * 2} for number in range(8)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text") / "model"
    tiny_model("llama").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))
    return str(folder)


def config(folder: Path, target: str) -> UnlearnConfig:
    """Documents against chats."""
    return UnlearnConfig(
        name="text",
        storage=str(folder / "runs"),
        method="grad_diff",
        model=ModelConfig(path=target),
        data=DataConfig(
            forget=lines(folder / "forget.jsonl", FORGET),
            retain=SourceConfig(path=lines(folder / "retain.jsonl", [{"messages": TURNS}] * 8).path, kind="messages"),
            format=FormatConfig(kind="text", max_length=64),
        ),
        training=TrainingConfig(rounds=6, batch_size=4),
        evaluation=EvaluationConfig(max_new_tokens=8, bootstrap_samples=20),
        tracking=TrackingConfig(system_metrics=False),
    )


def test_documents_are_forgotten_and_chats_kept(tmp_path: Path, target: str) -> None:
    run = apply_overrides(config(tmp_path, target), {"grad_diff.optimizer.lr": 0.01, "data.duplicates": "allow"})
    outcome = unlearn(run)
    before, after = outcome.metrics["before"], outcome.metrics["after"]
    assert after["forget_loss"]["value"] > before["forget_loss"]["value"] + 0.5
    assert after["retain_probability"]["value"] > before["retain_probability"]["value"]
    assert "retain_loss" not in after  # chats have answers, and their probability
    assert after["forget_truth_ratio"]["reason"].startswith("not applicable: the forget rows are texts")
    for name in ("forget_probability", "forget_rouge", "forget_extraction_strength", "forget_repetition"):
        assert after[name]["value"] is not None, name
    assert after["forget_probability"]["value"] == pytest.approx(np.exp(-after["forget_loss"]["value"]), rel=0.5)
    assert outcome.run["generations"].startswith("continuations of forget texts: ")
    files = [path for path in Path(outcome.home).rglob("*") if path.is_file()]
    assert (Path(outcome.home) / "report.html").is_file()
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    page = (Path(outcome.home) / "report.html").read_text()
    assert "<h3>Forget: continuations of texts</h3>" in page
    shown = re.findall(
        r"<code>(forget-\d+)</code></td>\s*<td class=\"\" data-model=\"(before)\">\s*<small>ROUGE-L", page
    )
    assert len(shown) == 5 and len({row for row, _ in shown}) == 5  # noqa: PT018
    assert "<h3>Retain</h3>" in page  # chats: answers, not continuations
    rows = pq.read_table(Path(outcome.home) / "rows.parquet").to_pylist()
    assert {row["kind"] for row in rows if row["set"] == "forget"} == {"text"}
    assert len({row["cluster"] for row in rows if row["set"] == "forget"}) == len(FORGET)


def test_values_of_passages_equal_a_plain_computation(tmp_path: Path, target: str) -> None:
    """Loss, extraction strength and ROUGE of continuations, written out; and the attacks that take texts."""
    run = config(tmp_path, target)
    data = apply_overrides(run.data, {"retain.path": lines(tmp_path / "texts.jsonl", RETAIN).path, "retain.kind": None})
    evaluation = Evaluator.of(apply_overrides(replace(run, data=data), {"report.reveal_text": True}), run.storage)
    table = evaluation.table(target, "target")
    rows = [row for row in table.to_pylist() if row["set"] == "forget"]
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    layout, wanted = TextLayout(tokenizer, data.format), []
    for document in FORGET:
        for first, second, ends in layout.passages(document["text"]):
            ids, start = layout.passage(first, second, ends=ends)
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            targets = torch.tensor(ids[1:])
            hits = (logp[:-1].argmax(-1) == targets)[:-1].tolist()
            run_of_hits = next((at for at, hit in enumerate(reversed(hits)) if not hit), len(hits))
            new = model.generate(torch.tensor([ids[:start]]), max_new_tokens=8, do_sample=False)[0, start:].tolist()
            pair = tokenizer.decode(ids[start : start + 8], skip_special_tokens=True), tokenizer.decode(new)
            score = RougeScorer(["rougeL"], use_stemmer=True).score(*pair)["rougeL"]
            wanted.append((-float(logp[:-1].gather(1, targets[:, None]).mean()), run_of_hits / len(hits), score.recall))
    assert len(rows) == len(wanted) > len(FORGET)
    for row, (loss, _, rouge) in zip(rows, wanted, strict=True):
        assert row["answer_nll"] == pytest.approx(loss, abs=1e-5)
        assert row["rouge_l_recall"] == pytest.approx(rouge, abs=1e-9)
    metrics = evaluation.metrics(table, None) or {}
    assert metrics["forget_loss"]["value"] == pytest.approx(np.mean([loss for loss, *_ in wanted]), abs=1e-5)
    assert metrics["forget_extraction_strength"]["value"] == pytest.approx(np.mean([one for _, one, _ in wanted]))
    assert {"retain_loss", "forget_rouge"} <= metrics.keys()
    forget, retain = (evaluation_rows(name, evaluation.sets[name], data.format) for name in ("forget", "retain"))
    attack = relearn(model, Template(tokenizer, data.format), forget, retain, RelearnOptions(rows=1, steps=(1,)))
    unattacked = attack.filter(pc.equal(attack["step"], 0)).to_pylist()
    losses = {row["row_id"]: row["answer_nll"] for row in unattacked}
    assert [losses[row["row_id"]] for row in rows] == pytest.approx([loss for loss, *_ in wanted], abs=1e-5)


def test_passages_are_represented_by_all_their_tokens(target: str) -> None:
    """For the alignment of documents: the mean over a passage's tokens, without the start token and the last one."""
    fmt, tokenizer = FormatConfig(kind="text", max_length=16), tiny_tokenizer()
    layout, model = TextLayout(tokenizer, fmt), tiny_model("llama")
    documents = ["a", "the answer", *(row["text"] for row in FORGET)]
    passages = [passage for document in documents for passage in layout.passages(document)]
    cells = [{"question": one, "answer": two, "kind": "text", "ends": ends} for one, two, ends in passages]
    rows = {"forget": evaluation_rows("forget", cells, fmt)}
    texts = alignment_texts(rows, Template(tokenizer, fmt))["forget"]
    layers = representations(model, texts, batch_size=5)
    assert len({len(ids) for ids, _ in texts}) > 2
    for row, (first, second, ends) in enumerate(passages):
        ids, _ = layout.passage(first, second, ends=ends)
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        wanted = [state[0, 1:-1].mean(0).numpy() for state in states]
        np.testing.assert_allclose([layer[row] for layer in layers], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "altpo"}, r"method = altpo gives questions other answers, but data\.forget has texts"),
        ({"data.forget.kind": "qa"}, r"no column 'question', only text"),
    ],
)
def test_what_does_not_fit_texts_is_refused(changes: dict[str, str], said: str, tmp_path: Path, target: str) -> None:
    with pytest.raises(UserError, match=said):
        unlearn(apply_overrides(config(tmp_path, target), changes))
    assert not (tmp_path / "runs" / "text").exists()
