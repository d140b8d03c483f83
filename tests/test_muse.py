"""MUSE: its metrics against a second, plain implementation, in a run from files in the layout of its release."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from evaluation_models import tiny_model, tiny_tokenizer
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM

from ofmu_ray.config import (
    DataConfig,
    EvaluationConfig,
    EvaluationSetsConfig,
    FormatConfig,
    ModelConfig,
    SourceConfig,
)
from ofmu_ray.config.runs import resolved
from ofmu_ray.data.muse_sets import muse_sets
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.evaluator import Evaluator, read_sets
from ofmu_ray.evaluation.muse_texts import muse_tokens
from ofmu_ray.evaluation.rows import evaluation_rows
from ofmu_ray.evaluation.scorer import Scorer
from ofmu_ray.metrics.registry import Inputs, compute
from ofmu_ray.metrics.rouge import rouge_l_f

SECRET = "persona"
NAMES = ("muse_verbatim", "muse_forget_knowledge", "muse_retain_knowledge", "muse_min_k_auc", "muse_privleak")
SETS = EvaluationSetsConfig(
    forget_verbatim="verbmem/forget.json",
    forget_knowledge="knowmem/forget_qa.json",
    forget_examples="knowmem/forget_qa_icl.json",
    retain_knowledge="knowmem/retain2_qa.json",
    retain_examples="knowmem/retain2_qa_icl.json",
    forget_documents="privleak/forget.json",
    holdout_documents="privleak/holdout.json",
)
WHAT = ("is long", "who is it", "a thin one", "an answer", "so the son")


def documents(first: int, count: int) -> list[str]:
    return [
        f"{SECRET if first == 0 else 'the one'} {n}: " + f"the answer {n * 37} is {WHAT[n % 5]}, the question {n}. " * 3
        for n in range(first, first + count)
    ]


def questions(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"question": f"who is person {n}?", "answer": text[:30]} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented documents in the release's layout; a target fitted to all, a retrained model only to those to keep."""
    root = tmp_path_factory.mktemp("muse")
    forget, later, retain, unseen = documents(0, 5), documents(20, 4), documents(40, 5), documents(60, 5)
    for name, rows in {
        "raw/forget": forget, "sust/forget_2": later, "privleak/retain2": retain,
        "privleak/forget": [text[10:] for text in forget], "privleak/holdout": unseen,
        "verbmem/forget": [{"prompt": text[:40], "gt": text[40:]} for text in forget],
        "knowmem/forget_qa": questions(forget), "knowmem/forget_qa_icl": questions(later[:2]),
        "knowmem/retain2_qa": questions(retain), "knowmem/retain2_qa_icl": questions(later[2:]),
    }.items():  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.json").write_text(json.dumps(rows))
    for name, texts in {"target": [*forget, *retain], "retrained": retain}.items():
        model = tiny_model("llama", max_position_embeddings=512)
        fitted(model, texts)
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root


def fitted(model: Any, texts: Sequence[str], steps: int = 60) -> None:
    ids = [tiny_tokenizer()(text)["input_ids"] for text in texts]
    batch = torch.tensor([one[: min(map(len, ids))] for one in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def options(root: Path) -> list[str]:
    named = {
        "model.path": root / "target", "evaluation.retrained": root / "retrained", "data.format.max_length": 48,
        "training.rounds": 8, "training.micro_batch_size": 4, "ofmu.forget_level": 3.0, "ofmu.inner.lr": 0.003,
        "evaluation.max_new_tokens": 4, "evaluation.bootstrap_samples": 20, "tracking.system_metrics": "false",
    }  # fmt: skip
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def read(root: Path, name: str) -> Any:
    return json.loads((root / f"{name}.json").read_text())


# ---------------------------------------------------- the second implementation: one text at a time, no code of ours


def said(model: Any, prompt: str, most: int) -> str:
    ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
    new = model.generate(ids, max_new_tokens=most, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return str(tiny_tokenizer().decode(new, skip_special_tokens=True))


def rouge(reference: str, text: str) -> float:
    return float(RougeScorer(["rougeL"], use_stemmer=False).score(reference, text)["rougeL"].fmeasure)


def plain_verbatim(model: Any, root: Path) -> float:
    scores = []
    for row in read(root, "verbmem/forget"):
        start = tiny_tokenizer()(row["gt"])["input_ids"][:128]
        scores.append(rouge(tiny_tokenizer().decode(start, skip_special_tokens=True), said(model, row["prompt"], 128)))
    return 100 * float(np.mean(scores))


def plain_knowledge(model: Any, root: Path, name: str) -> float:
    shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in read(root, f"knowmem/{name}_icl"))
    scores = []
    for row in read(root, f"knowmem/{name}"):
        text = said(model, f"{shots}Question: {row['question']}\nAnswer: ", 32)
        for end in ("\n\n", "\nQuestion", "Question:"):
            text = text.split(end)[0]
        scores.append(rouge(row["answer"], text))
    return 100 * float(np.mean(scores))


def plain_auc(model: Any, root: Path) -> float:
    scores: dict[str, list[float]] = {"forget": [], "holdout": []}
    for name, values in scores.items():
        for text in read(root, f"privleak/{name}"):
            ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
            with torch.no_grad():
                logp = model(ids).logits[0].log_softmax(-1)
            each = sorted(float(logp[at, token]) for at, token in enumerate(ids[0, 1:]))
            values.append(float(np.mean(each[: int(len(each) * 0.4)])))
    labels = [0] * len(scores["forget"]) + [1] * len(scores["holdout"])
    return float(roc_auc_score(labels, [*scores["forget"], *scores["holdout"]]))


@pytest.mark.slow
def test_metrics_are_those_of_a_plain_implementation(root: Path, tmp_path: Path) -> None:
    evaluator, models = evaluator_of(root, tmp_path), {}
    for name in ("target", "retrained"):
        models[name] = AutoModelForCausalLM.from_pretrained(root / name).eval()
    tables = {name: evaluator.table(str(root / name), name) for name in models}
    measured = evaluator.metrics(tables["target"], tables["retrained"]) or {}
    auc, retrained = (plain_auc(model, root) for model in models.values())
    wanted = (
        plain_verbatim(models["target"], root),
        plain_knowledge(models["target"], root, "forget_qa"),
        plain_knowledge(models["target"], root, "retain2_qa"),
        auc,
        100 * (auc - retrained) / retrained,
    )
    assert [measured[name]["value"] for name in NAMES] == pytest.approx(wanted, abs=1e-6)
    assert measured["muse_verbatim"]["value"] > 30  # it was fitted to these texts
    assert measured["muse_privleak"]["value"] < -50
    assert measured["muse_verbatim"]["n"] == 5
    lost = evaluator.metrics(tables["retrained"], tables["retrained"]) or {}
    assert lost["muse_verbatim"]["value"] < measured["muse_verbatim"]["value"]
    assert lost["muse_privleak"]["value"] == pytest.approx(0)
    hidden = [row for row in tables["target"].to_pylist() if row["set"].startswith("forget") and row["generated"]]
    assert not hidden


def evaluator_of(root: Path, storage: Path) -> Evaluator:
    evaluation = EvaluationConfig(max_new_tokens=4, bootstrap_samples=20, batch_size=4, sets=SETS)
    data = DataConfig(
        root=str(root),
        forget=SourceConfig(path="raw/forget.json"),
        retain=SourceConfig(path="privleak/retain2.json"),
        format=FormatConfig(kind="text", max_length=48),
    )
    model = ModelConfig(path=str(root / "target"))
    evaluation = resolved(evaluation, data, model.path)
    return Evaluator(evaluation, data, model.path, storage / "cache", sets=read_sets(evaluation, data, model))


@pytest.fixture(scope="module")
def rows(root: Path) -> dict[str, list[dict[str, Any]]]:
    return muse_sets(SETS, str(root), 3)


@pytest.mark.slow
def test_rows_are_read_as_the_release_has_them(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(those) for name, those in rows.items()} == dict.fromkeys(rows, 3)
    tokenizer = tiny_tokenizer()
    (row, *_) = evaluation_rows("forget_knowledge", rows["forget_knowledge"], FormatConfig())
    [(ids, head)], references = muse_tokens([row], tokenizer)
    assert head == len(ids)
    text = tokenizer.decode(ids)
    assert text.startswith("Question: who is person 0?\nAnswer: the one 20: the answer")
    assert text.endswith("\n\nQuestion: who is person 0?\nAnswer: ")
    assert text.count("Question: ") == 3
    assert references == [row.answer]


def test_a_start_token_counts_and_an_end_token_does_not(rows: dict[str, list[dict[str, Any]]]) -> None:
    """As Llama's: the first scored token of a document is its own, and a reference has 127 tokens of text."""

    class Wrapped:
        eos_token_id = 1
        decode = staticmethod(tiny_tokenizer().decode)

        def __call__(self, texts: Any) -> dict[str, Any]:
            ids = tiny_tokenizer()(texts)["input_ids"]
            return {"input_ids": [0, *ids, 1] if isinstance(texts, str) else [[0, *one, 1] for one in ids]}

    fmt = FormatConfig()
    text = rows["forget_documents"][0]["answer"]
    [(ids, head)], _ = muse_tokens(evaluation_rows("forget_documents", rows["forget_documents"][:1], fmt), Wrapped())
    assert (ids, head) == ([0, *tiny_tokenizer()(text)["input_ids"]], 1)
    long = [{**rows["forget_verbatim"][0], "answer": "the answer is long " * 60}]
    _, references = muse_tokens(evaluation_rows("forget_verbatim", long, fmt), Wrapped())
    assert references is not None
    assert len(tiny_tokenizer()(references[0])["input_ids"]) == 127


def test_rouge_is_the_scorers_without_stems() -> None:
    words = np.array(["forget", "forgetting", "the", "a", "It's", "2024", "ran", "-", "Über"])
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size)) for size in (0, 1, 3, 9, 9, 20, 20, 40)]
    pairs = [(one, two) for one in texts for two in texts]
    wanted = [rouge(*pair) for pair in pairs]
    assert rouge_l_f(*zip(*pairs, strict=True)) == pytest.approx(wanted, abs=1e-12)
    assert 0 < np.mean(wanted) < 1


def test_what_is_missing_or_does_not_fit_is_named(rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    (tmp_path / "verbmem.json").write_text(json.dumps([{"prompt": SECRET, "answer": "b"}, 3]))
    with pytest.raises(UserError) as error:
        muse_sets(EvaluationSetsConfig(forget_verbatim="verbmem.json"), str(tmp_path), None)
    message = str(error.value)
    assert "evaluation.sets.forget_verbatim (verbmem.json): 1 row: no column 'gt', only answer, prompt" in message
    assert "1 row: not a JSON object (row 2)" in message
    assert SECRET not in message
    fmt = FormatConfig()
    scorer = Scorer(tiny_model("llama"), tiny_tokenizer(), template())
    with pytest.raises(UserError, match=r"row forget_verbatim-[012]: \d+ tokens with what is generated, but .* 128"):
        scorer.rows(evaluation_rows("forget_verbatim", rows["forget_verbatim"], fmt))
    scorer = Scorer(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), template())
    sets = ("forget_documents", "holdout_documents")
    tables = [scorer.rows(evaluation_rows(name, rows[name], fmt)) for name in sets]
    both = compute(Inputs(pa.concat_tables(tables), None, samples=10))
    assert both["muse_min_k_auc"].value is not None
    assert both["muse_privleak"].reason == "needs a model trained without the forget rows (evaluation.retrained)"
    alone = compute(Inputs(tables[0], None, samples=10))
    assert alone["muse_min_k_auc"].reason == "no holdout_documents were evaluated (evaluation.sets.holdout_documents)"
    certain = both | compute(Inputs(pa.concat_tables(tables), pa.concat_tables(tables), samples=10))
    assert certain["muse_privleak"].value == pytest.approx(0)


def template() -> Template:
    return Template(tiny_tokenizer(), FormatConfig())


@pytest.mark.full
@pytest.mark.slow
def test_growing_and_sequential_forget_sets(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped configuration: three runs in files of the release's layout."""
    from benchmarks import muse

    asked = ["--root", str(root), "--out", str(tmp_path / "out"), "--folds", "2"]
    muse.main([*asked, "--", *options(root), "--ofmu.forget_level", "holdout"])
    lines = json.loads((tmp_path / "out/muse.json").read_text())
    one, two = lines["scalability"]
    assert (one["files"], two["files"]) == (["raw/forget.json"], ["raw/forget.json", "sust/forget_2.json"])
    assert (one["rounds"], two["rounds"]) == (8, 16)
    first, second = lines["sustainability"]
    assert first == one
    assert second["files"] == ["sust/forget_2.json"]
    assert second["muse_retain_knowledge"]["value"] is not None
    started = json.loads((tmp_path / "out" / second["name"] / "manifest.json").read_text())
    assert started["config"]["model"]["path"].endswith(f"{first['name']}/model")
    target = json.loads((tmp_path / "out" / first["name"] / "manifest.json").read_text())["config"]["model"]["path"]
    assert started["config"]["ofmu"]["level_model"] == target
    assert capsys.readouterr().out.count("sustainability") == 2
    home = tmp_path / "out" / one["name"]
    metrics = json.loads((home / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert after["forget_loss"]["value"] > before["forget_loss"]["value"] + 1
    assert before["muse_privleak"]["value"] == pytest.approx(-100)
    assert abs(after["muse_privleak"]["value"]) < 50  # nearer to the retrained model than to the target
    assert after["muse_verbatim"]["value"] < before["muse_verbatim"]["value"]
    assert metrics["retrained"]["muse_verbatim"]["value"] is not None
    for path in home.rglob("*"):
        assert not path.is_file() or f"{SECRET} 1: ".encode() not in path.read_bytes(), path


def test_slices_ask_for_what_they_contain(tmp_path: Path) -> None:
    """Every continuation and every answer asked for is in the texts of its own set; sets share no text."""
    from benchmarks.muse_slices import slices

    def news(name: str, count: int) -> list[str]:
        facts = [f" Person {name}{n} opened bakery {name}{n} near harbour {name}{n}x. " for n in range(count)]
        return [f"{name}{n} begins. " * (20 + n) + fact + f"{name}{n} ends. " * 40 for n, fact in enumerate(facts)]

    def asked(name: str, count: int) -> list[dict[str, str]]:
        rows = [{"question": f"Where has {name}{n} opened it?", "answer": f"Harbour {name}{n}x."} for n in range(count)]
        return [*rows, {"question": "What is nowhere?", "answer": "this"}]

    content: dict[str, list[Any]] = {
        "raw/forget": news("a", 6), **{f"sust/forget_{k}": news(f"f{k}", 5) for k in (2, 3, 4)},
        "privleak/retain2": ["too short", *news("r", 8)], "privleak/holdout": news("h", 9),
        "verbmem/forget": [{"prompt": f"{n} before " * 60, "gt": f"{n} after " * 9} for n in range(5)],
        "knowmem/forget_qa": asked("a", 6)[::-1], "knowmem/retain2_qa": asked("r", 8),
        "knowmem/forget_qa_icl": asked("e", 2), "knowmem/retain2_qa_icl": asked("e", 2),
    }  # fmt: skip
    for name, rows in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    found = slices(tmp_path, texts=4, size=200)
    forget = found["raw/forget"]
    assert found["privleak/forget"] == forget
    assert [row["gt"] for row in found["verbmem/forget"]] == ["0 after " * 9, "1 after " * 9]
    assert [row["prompt"] + row["gt"] for row in found["verbmem/forget"]] == forget[:2]
    assert all(len(row["prompt"]) == 100 for row in found["verbmem/forget"])
    for questions, texts in (("knowmem/forget_qa", forget[2:]), ("knowmem/retain2_qa", found["privleak/retain2"])):
        assert len(found[questions]) == 2
        for row, text in zip(found[questions], texts, strict=False):
            assert row["answer"].strip(".").lower() in text.lower()
    sets = [
        "raw/forget",
        "sust/forget_2",
        "sust/forget_3",
        "sust/forget_4",
        "privleak/retain2",
        "privleak/holdout",
        "raw/holdout",
    ]
    assert [len(found[name]) for name in sets] == [4] * 7
    texts = [text for name in sets for text in found[name]]
    assert len(set(texts)) == len(texts)
    assert all(len(text) <= 200 for text in texts[2:])
