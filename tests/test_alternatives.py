"""AltPO's alternatives: drawn once, independent of batches, one per epoch, with the reference model's values."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_reference import TARGET, answer, close, model, prepared, template  # noqa: F401 (fixtures)

from ofmu_ray import config
from ofmu_ray.cluster import map_tasks
from ofmu_ray.config import UnlearnConfig
from ofmu_ray.data.batch_plan import write_plan
from ofmu_ray.data.batches import local_rounds, padded
from ofmu_ray.data.prepare import PreparedData
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.generation import Sampling
from ofmu_ray.features import alternatives, reference, value_tables
from ofmu_ray.features.protocol import FeatureContext
from ofmu_ray.features.reference import write_references
from ofmu_ray.methods import build_method

COUNT, ROWS, BATCH = 3, 8, 4
ROUNDS = 2 * COUNT * ROWS // BATCH  # every alternative twice
OPTIONS = config.METHODS["altpo"](alternatives=COUNT, max_new_tokens=24)


@pytest.fixture(scope="module")
def few(prepared: PreparedData) -> PreparedData:  # noqa: F811
    forget = prepared.streams["forget"]
    cut = dataclasses.replace(forget, dropped=np.arange(ROWS, forget.rows))
    return dataclasses.replace(prepared, streams={**prepared.streams, "forget": cut})


def computed(few: PreparedData, folder: Path, options: Any = OPTIONS, **more: Any) -> tuple[Any, str]:
    numbers = {"rounds": ROUNDS, "batch_size": BATCH, "workers": more.pop("workers", 1), "seed": 1}
    plan = write_plan(few.streams, str(folder / "plan"), batches_per_round={"forget": 1, "retain": 1}, **numbers)
    places = {
        "folder": str(folder / "run"),
        "cache": str(folder / "cache"),
        "settings": FeatureContext("altpo", seed=more.pop("seed", 0)),
    }
    return plan, write_references(build_method(options).needs, few, plan, TARGET, **places, **more)["forget"]


@pytest.fixture(scope="module")
def finished(few: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    folder = tmp_path_factory.mktemp("alternatives")
    return folder, *computed(few, folder)


def stored(sidecar: str) -> dict[str, dict[str, Any]]:
    content = json.loads(Path(sidecar, "sidecar.json").read_text())
    [texts] = content["texts"].values()
    assert texts["count"] == COUNT
    return {row["row_id"]: row for row in pq.read_table(texts["path"]).to_pylist()}


@pytest.mark.slow
def test_they_answer_the_rows_own_questions_and_differ(finished: Any, few: PreparedData) -> None:
    rows = {row["row_id"]: row for row in tokens(few)}
    texts = stored(finished[2])
    assert sorted(texts) == sorted(f"{row_id}/{number}" for row_id in rows for number in range(COUNT))
    own = 0
    for text_id, row in texts.items():
        like = rows[text_id.rpartition("/")[0]]
        assert row["input_ids"][: row["prompt_tokens"]] == like["input_ids"][: like["prompt_tokens"]]
        assert row["input_ids"][-1] == few.template.eos
        own += row["input_ids"] == like["input_ids"]
    assert own < 0.5 * len(texts), "mostly the memorised answers"
    assert len({tuple(row["input_ids"]) for row in texts.values()}) > 0.7 * len(texts)


def tokens(few: PreparedData) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(Path(few.streams["forget"].folder, "part.parquet")).to_pylist()
    return rows[:ROWS]


@pytest.mark.slow
def test_batches_workers_and_the_second_time_change_nothing(
    finished: Any, few: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_tables, "BATCH_TOKENS", 1)  # a text at a time
    one_by_one = stored(computed(few, tmp_path, workers=2)[1])
    assert one_by_one == stored(finished[2])
    monkeypatch.setattr(reference, "task_named", lambda _: pytest.fail("the model was loaded again"))
    assert computed(few, finished[0])[1] == finished[2]
    monkeypatch.undo()
    other = stored(computed(few, tmp_path / "other", seed=1)[1])
    assert sum(other[text] == row for text, row in one_by_one.items()) < 0.5 * len(other)


@torch.no_grad()
def test_each_epoch_brings_another_one_with_its_reference(finished: Any, few: PreparedData, model: Any) -> None:  # noqa: F811
    """Over the rounds of both epochs, from the first and from a later one: a resumed run reads the same."""
    _, plan, sidecar = finished
    options: dict[str, Any] = {
        "micro_batch_size": 2,
        "collate": padded(few.template.pad),
        "sidecars": {"forget": sidecar},
    }
    by_id, met = stored(sidecar), Counter[str]()
    all_rounds = list(local_rounds(plan, 0, **options))
    for number, batches in enumerate(all_rounds):
        (batch,) = batches["forget"]
        epoch = number * BATCH // ROWS
        texts = [f"{row_id}/{epoch % COUNT}" for row_id in batch.row_ids]
        met.update(texts)
        read = [
            ids[mask.bool()].tolist()
            for micro in batch.micro
            for ids, mask in zip(micro["refusal_input_ids"], micro["refusal_attention_mask"], strict=True)
        ]
        assert read == [by_id[text]["input_ids"] for text in texts]
        if number == ROUNDS - 1:
            for micro in batch.micro:
                sums = [answer(micro, row, model, "refusal_")[2] for row in range(len(micro["input_ids"]))]
                assert close(micro["refusal_reference_nll"], torch.stack(sums), 1e-3)
    assert set(met.values()) == {2}
    assert len(met) == COUNT * ROWS
    for later, like in zip(local_rounds(plan, 0, start_round=5, **options), all_rounds[5:], strict=True):
        for micro, other in zip(later["forget"][0].micro, like["forget"][0].micro, strict=True):
            assert all(torch.equal(micro[name], other[name]) for name in other)


def test_only_numbers_outlive_the_run(finished: Any) -> None:
    for path in (finished[0] / "cache").rglob("*.parquet"):
        assert pq.read_schema(path).names == ["row_id", "entries"]
    assert list((finished[0] / "run" / "private").glob("*.parquet"))


def test_draws_follow_the_probabilities_of_the_likeliest_tokens() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])).expand(4000, 4)
    draws = Sampling.of([str(number) for number in range(4000)], 1, temperature=0.5, top_k=3)
    drawn = draws.tokens(logits, range(4000), 0)[:, 0]
    shares = torch.bincount(drawn, minlength=4) / 4000
    expected = torch.tensor([0.0, 16.0, 4.0, 9.0]) / 29  # squares, without the least likely
    assert float((shares - expected).abs().max()) < 0.03  # four standard errors
    again = draws.tokens(logits[:2], [7, 3], 0)[:, 0]
    assert again.tolist() == [int(drawn[7]), int(drawn[3])]


def test_a_prompt_asks_for_another_answer(few: PreparedData) -> None:
    row = tokens(few)[0]
    question, truth = alternatives.texts(row, few.template)
    assert few.template.encode(question, truth)[0] == row["input_ids"]
    (first, second) = alternatives.alternative_prompts([row], 2, "Invent: {question} Not: {answer}", few.template)
    assert first["input_ids"] == few.template.encode_prompt(f"Invent: {question} Not: {truth}") == second["input_ids"]
    assert [first["row_id"], second["row_id"]] == [f"{row['row_id']}/{number}" for number in (0, 1)]
    needs = build_method(config.METHODS["altpo"](prompt="Invent: {question}")).needs
    assert [need.of.temperature for need in needs if need.of] == [1.0]


def test_texts_of_a_row_without_its_chat_layout(template: Template) -> None:  # noqa: F811
    import copy

    tokenizer = copy.deepcopy(template.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}who {{ m['role'] }}: {{ m['content'] }} end {% endfor %}"
        "{% if add_generation_prompt %}who assistant: {% endif %}"
    )
    chat = Template(tokenizer, config.FormatConfig())
    ids, prompt = chat.encode("Where was she born?", "In Peibrux.")
    row = {"row_id": "a", "input_ids": ids, "prompt_tokens": prompt}
    assert alternatives.texts(row, chat) == ("Where was she born?", "In Peibrux.")


@pytest.mark.parametrize(
    ("options", "word"),
    [({"alternatives": 0}, "alternatives"), ({"prompt": "Say something"}, "prompt"), ({"temperature": 0.0}, "temper")],
)
def test_options_that_make_no_sense(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=rf"altpo\.{word}"):
        UnlearnConfig(altpo=config.METHODS["altpo"](**options))


@pytest.mark.full
def test_actors_draw_the_same(
    finished: Any,
    few: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    local_ray: None,
) -> None:
    monkeypatch.setattr(map_tasks, "SMALL_FLOPS", 0.0)
    monkeypatch.setattr(value_tables, "BATCH_TOKENS", 200)
    assert stored(computed(few, tmp_path)[1]) == stored(finished[2])
