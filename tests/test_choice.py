"""Multiple choice against a separate slow computation, and against lm-evaluation-harness if installed."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from evaluation_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ofmu_ray.attacks.lm_eval import run_lm_eval
from ofmu_ray.config import SourceConfig
from ofmu_ray.data.choices import ChoiceRow, choice_rows
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation import multiple_choice as choice
from ofmu_ray.evaluation.multiple_choice import choice_metrics, choice_table, prompt

MMLU = ROOT.parent / "shared/data/mmlu/test.parquet"
CELLS = [
    {
        "question": f"who {'is ' * (row % 3)}person {row}? ",
        "choices": [f"answer {'long ' * ((row + k) % 3)}{k}" for k in range(3 + row % 2)],
        "answer": row % 3,
        "subject": ("high_school_persons", "answers")[row % 2],
    }
    for row in range(14)
]


def _tokenizer() -> Any:
    """Bytes and a few merges, among them " A" to " D": a letter is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" A B C D E"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _written(folder: Path, cells: list[Any]) -> SourceConfig:
    path = folder / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in cells))
    return SourceConfig(path=str(path))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[ChoiceRow]:
    return choice_rows(_written(tmp_path_factory.mktemp("rows"), CELLS), name="mmlu", option="choice.source")


def _slow(model: Any, tokenizer: Any, text: str, continuation: str) -> list[float]:
    """log p of each token of the continuation: one text alone, all logits."""
    head, whole = tokenizer(text)["input_ids"], tokenizer(text + continuation)["input_ids"]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
    return [float(logp[t - 1, whole[t]]) for t in range(len(head), len(whole))]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gpt2"])
@pytest.mark.parametrize("one_token", [True, False])
def test_letters_equal_a_slow_computation(architecture: str, one_token: bool, rows: list[ChoiceRow]) -> None:
    tokenizer, model = _tokenizer() if one_token else tiny_tokenizer(), tiny_model(architecture)
    model.config.max_position_embeddings = 1024  # rotary: nothing is cut
    assert (len(tokenizer(" A")["input_ids"]) == 1) == one_token
    expected = [
        [sum(_slow(model, tokenizer, prompt(row), f" {letter}")) for letter in "ABCDEF"[: len(row.choices)]]
        for row in rows
    ]
    for batch_size in (1, 5, 64):
        table = choice_table(model, tokenizer, rows, batch_size=batch_size)
        for scores, wanted in zip(table["scores"].to_pylist(), expected, strict=True):
            assert scores == pytest.approx(wanted, rel=1e-4)
        assert table["chosen"].to_pylist() == [int(np.argmax(values)) for values in expected]


def test_one_token_letters_take_one_forward_and_one_position_per_row(rows: list[ChoiceRow]) -> None:
    model, shapes = tiny_model(), []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    choice_table(model, _tokenizer(), rows, batch_size=8)
    handle.remove()
    assert shapes == [(8, 320), (6, 320)]


def _two_hundred() -> list[dict[str, Any]]:
    """Evenly spread questions of MMLU."""
    if not MMLU.is_file():
        pytest.skip("no ../shared/data/mmlu beside the checkout: MMLU is not part of the repository")
    cells: list[dict[str, Any]] = pq.read_table(MMLU).to_pylist()
    return [cells[index * len(cells) // 200] for index in range(200)]


@pytest.mark.full
@pytest.mark.slow
def test_accuracy_on_two_hundred_questions_of_mmlu_is_the_harness_s() -> None:
    """Its prompts and scores written out from the data set's own columns: log p of " A" to " D" after the prompt."""
    right: dict[str, list[bool]] = {}
    model, tokenizer = tiny_model(), _tokenizer()
    model.config.max_position_embeddings = 1 << 15
    for cell in _two_hundred():
        options = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", cell["choices"], strict=True))
        about = cell["subject"].replace("_", " ")
        text = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        text += f"{cell['question'].strip()}\n{options}Answer:"
        scores = [sum(_slow(model, tokenizer, text, f" {letter}")) for letter in "ABCD"]
        right.setdefault(cell["subject"], []).append(int(np.argmax(scores)) == cell["answer"])
    weighted = sum(len(answers) * float(np.mean(answers)) for answers in right.values()) / 200  # as its group mmlu
    rows = choice_rows(SourceConfig(path=str(MMLU)), name="mmlu", option="o")
    table = choice_table(model, tokenizer, [rows[index * len(rows) // 200] for index in range(200)])
    results = choice_metrics(table, samples=10, seed=0, name="mmlu")["accuracy"]
    assert results.value == pytest.approx(weighted, abs=1e-12)
    assert (results.n, len(right) > 50) == (200, True)
    assert 0.1 < weighted < 0.5


def test_cloze_scores_the_mean_over_the_texts_tokens(rows: list[ChoiceRow]) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.max_position_embeddings = 1024
    table = choice_table(model, tokenizer, rows, scoring="cloze", batch_size=4)
    for row, scores in zip(rows, table["scores"].to_pylist(), strict=True):
        text = prompt(row, "cloze")
        assert scores == pytest.approx([np.mean(_slow(model, tokenizer, text, f" {c}")) for c in row.choices], rel=1e-4)
    assert "A. " not in prompt(rows[0], "cloze")


def test_prompt_is_the_harness_one() -> None:
    row = ChoiceRow("x-1", " Why? ", ("one", "two"), 0, "high_school_us_history")
    header = "The following are multiple choice questions (with answers) about high school us history.\n\n"
    assert prompt(row) == header + "Why?\nA. one\nB. two\nAnswer:"
    assert prompt(ChoiceRow("x-1", "Why?", ("one", "two"), 0)) == "Why?\nA. one\nB. two\nAnswer:"


def test_table_and_metrics(rows: list[ChoiceRow]) -> None:
    table = choice_table(tiny_model(), _tokenizer(), rows)
    assert table.schema == choice.CHOSEN
    assert table["row_id"].to_pylist()[:2] == ["mmlu-1", "mmlu-2"]
    assert set(table["cluster"].to_pylist()) == {"high_school_persons", "answers"}
    correct = [row.answer == chosen for row, chosen in zip(rows, table["chosen"].to_pylist(), strict=True)]
    metrics = choice_metrics(table, samples=200, seed=0, name="mmlu")
    chance = (7 / 3 + 7 / 4) / 14
    assert metrics["accuracy"].value == pytest.approx(np.mean(correct))
    assert metrics["above_chance"].value == pytest.approx(np.mean(correct) - chance)
    assert (metrics["accuracy"].n, metrics["accuracy"].clusters) == (14, 2)
    one = table.set_column(1, "cluster", pa.array(["answers"] * 14, pa.string()))
    single = choice_metrics(one, samples=200, seed=0, name="mmlu")["accuracy"]
    assert single.clusters is None  # one subject is no reason to have no interval
    assert single.low is not None


def test_a_model_that_knows_the_letter_is_right() -> None:
    """An output head that favours one letter chooses it on every row."""
    model, tokenizer = tiny_model(), _tokenizer()
    cells = [ChoiceRow(f"x-{n}", "who?", ("a", "b", "c"), n % 3) for n in range(6)]
    letter = tokenizer(" B")["input_ids"][-1]
    bias = torch.zeros(320)
    bias[letter] = 1e3
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output + bias)
    table = choice_table(model, tokenizer, cells)
    assert table["chosen"].to_pylist() == [1] * 6
    assert choice_metrics(table, samples=10, seed=0, name="x")["above_chance"].value == pytest.approx(0)


def test_long_texts_lose_their_beginning() -> None:
    model, tokenizer = tiny_model("gpt2"), _tokenizer()  # 128 learned positions: one more would fail
    long = ChoiceRow("x-1", "who? " * 60, ("a", "b"), 0)
    table = choice_table(model, tokenizer, [long])
    ids = tokenizer(prompt(long) + " A")["input_ids"]
    assert table["cut"].to_pylist() == [len(ids) - 128]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids[-128:-1]])).logits[0, -1].log_softmax(dim=-1)
    letters = [tokenizer(f" {letter}")["input_ids"][-1] for letter in "AB"]
    assert table["scores"].to_pylist()[0] == pytest.approx(logp[letters].tolist(), rel=1e-4)
    with pytest.raises(UserError, match="row x-2"):
        choice_table(model, tokenizer, [ChoiceRow("x-2", "who?", ("a", "b " * 200), 0)], scoring="cloze")


def test_parquet_and_the_subjects_of_the_header(tmp_path: Path) -> None:
    plain = [{key: value for key, value in row.items() if key != "subject"} for row in CELLS]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "wmdp.parquet")
    path = str(tmp_path / "wmdp.parquet")
    bio = choice_rows(SourceConfig(path=path, hub_config="wmdp-bio"), name="wmdp", option="o")
    assert {(row.subject, row.cluster) for row in bio} == {("biology", None)}
    assert {row.subject for row in choice_rows(SourceConfig(path=path), name="wmdp", option="o")} == {None}
    given = choice_rows(_written(tmp_path, CELLS), name="mmlu", option="o", subject="people")
    assert {row.subject for row in given} == {"people"}
    assert {row.cluster for row in given} == {"high_school_persons", "answers"}


def test_every_broken_row_is_named_and_no_text_is_shown(tmp_path: Path) -> None:
    good = {"question": "SECRET?", "choices": ["SECRET a", "b"], "answer": 0}
    broken = [
        good,
        good | {"answer": 2},
        good | {"answer": "A"},
        good | {"answer": True},
        good | {"choices": ["SECRET"]},
        good | {"choices": "SECRET"},
        good | {"choices": ["SECRET", " "]},
        {"question": " ", "choices": ["SECRET", "b"], "answer": 0},
        ["SECRET"],
    ]
    with pytest.raises(UserError) as error:
        choice_rows(_written(tmp_path, broken), name="wmdp", option="choice.source")
    message = str(error.value)
    assert all(f"row {number}" in message for number in range(2, 10))
    assert "row 1 " not in message
    assert "SECRET" not in message
    assert "choice.source" in message
    with pytest.raises(UserError, match="no rows"):
        choice_rows(_written(tmp_path, []), name="wmdp", option="choice.source")


# ------------------------------------------------------------------------------------------ lm-evaluation-harness


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'ofmu-ray\[lm-eval\]'"):
        run_lm_eval(tmp_path, ["wmdp"])


def test_an_unknown_task_is_named_with_its_option() -> None:
    from ofmu_ray.attacks.lm_eval import _check_names

    with pytest.raises(UserError, match=r"^checks\.lm_eval: no task nothing in lm-evaluation-harness;"):
        _check_names(["nothing"], ["wmdp"], None)


@pytest.mark.system
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is an optional extra")
def test_harness_agrees(tmp_path: Path) -> None:
    """A custom task with WMDP's layout, from a local file."""
    four = [row | {"choices": [f"answer {k}" for k in range(4)]} for row in CELLS]
    source = _written(tmp_path, four)
    lettered = [f"{letter}. {{{{choices[{place}]}}}}" for place, letter in enumerate("ABCD")]
    text = "\\n".join(["{{question.strip()}}", *lettered, "Answer:"])
    (tmp_path / "task.yaml").write_text(
        f"""task: ofmu_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {source.path}}}}}
test_split: test
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about people.\\n\\n"
doc_to_text: "{text}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    for seed, tokenizer in ((0, _tokenizer()), (1, tiny_tokenizer())):
        model = tiny_model(seed=seed)
        model.config.max_position_embeddings = 512
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        accuracy = run_lm_eval(tmp_path / "model", ["ofmu_tiny"], include_path=tmp_path)["ofmu_tiny"]["acc"]
        rows = choice_rows(source, name="wmdp", option="o", subject="people")
        ours = choice_metrics(choice_table(model, tokenizer, rows), samples=10, seed=0, name="x")["accuracy"]
        assert accuracy.value == ours.value
        assert accuracy.n == 14
        assert accuracy.low is not None
    with pytest.raises(UserError, match="no task nothing"):
        run_lm_eval(tmp_path / "model", ["nothing"], include_path=tmp_path)


@pytest.mark.full
@pytest.mark.system
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is an optional extra")
def test_harness_agrees_on_two_hundred_questions_of_mmlu(tmp_path: Path) -> None:
    """Its own tasks, a subject each, with local files in place of the hub's."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    theirs = Path(spec.origin).parent / "tasks/mmlu/default"
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for cell in _two_hundred():
        by_subject.setdefault(cell["subject"], []).append(cell)
    for subject, cells in by_subject.items():
        (tmp_path / f"{subject}.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
        files = json.dumps({"test": str(tmp_path / f"{subject}.jsonl")})
        (tmp_path / f"{subject}.yaml").write_text(
            f"include: {theirs}/mmlu_{subject}.yaml\ntask: ofmu_{subject}\ntask_alias: {subject}\ntag: ofmu\n"
            f"dataset_path: json\ndataset_name: null\ndataset_kwargs: {{data_files: {files}}}\n"
            "fewshot_split: test\nnum_fewshot: 0\n"
        )
    model, tokenizer = tiny_model(), _tokenizer()
    model.config.max_position_embeddings = 1 << 15
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tasks = run_lm_eval(tmp_path / "model", [f"ofmu_{subject}" for subject in by_subject], include_path=tmp_path)
    for subject, cells in by_subject.items():
        rows = choice_rows(_written(tmp_path, cells), name="mmlu", option="o")
        ours = choice_metrics(choice_table(model, tokenizer, rows), samples=10, seed=0, name="x")["accuracy"]
        accuracy = tasks[f"ofmu_{subject}"]["acc"]
        assert (accuracy.value, accuracy.n) == (ours.value, len(cells)), subject
