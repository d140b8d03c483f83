"""Features of rows: right values, independent of batches; cached; no forget text outside the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.cluster import map_tasks
from ofmu_ray.config import FormatConfig, ModelConfig, SourceConfig
from ofmu_ray.data.answer_encoder import AnswerEncoder
from ofmu_ray.data.batch_plan import write_plan
from ofmu_ray.data.batches import local_rounds, padded
from ofmu_ray.data.prepare import PreparedData
from ofmu_ray.data.row_checks import DataReport
from ofmu_ray.data.sources import fragments
from ofmu_ray.data.stored_stream import TokenisedStream
from ofmu_ray.data.template import Template
from ofmu_ray.data.tokenise import PartJob, encode_fragment
from ofmu_ray.errors import UserError
from ofmu_ray.features import reference, refusals, value_tables
from ofmu_ray.features.builtin import LOG_PROBABILITIES, NLL, Activations, Refusals
from ofmu_ray.features.protocol import FeatureContext, Need
from ofmu_ray.features.reference import write_references
from ofmu_ray.features.value_tables import cut
from ofmu_ray.models.loading import load_tokenizer

TARGET = ModelConfig()
NEEDS = (
    Need("forget", NLL),
    Need("forget", LOG_PROBABILITIES),
    Need("forget", Refusals()),
    Need("forget", NLL, of=Refusals()),
    Need("retain", LOG_PROBABILITIES),
    Need("retain", Activations(2)),
)
ROUNDS, BATCH = 5, 4


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(load_tokenizer(TARGET), FormatConfig())


def encoder_of(template: Template) -> AnswerEncoder:
    return AnswerEncoder(template.tokenizer, template.config)


def stream(name: str, folder: Path, template: Template) -> TokenisedStream:
    """The built-in rows as tokens, without Ray (which `prepare_streams` would start)."""
    (piece,) = fragments(SourceConfig(path=f"builtin:people/{name}.jsonl"), None, stream=name, option=f"data.{name}")
    folder.mkdir(parents=True, exist_ok=True)
    part = encode_fragment(PartJob(piece, str(folder / "part.parquet")), encoder_of(template))
    lengths = pq.read_table(folder / "part.parquet")["length"].to_numpy()
    none = np.empty(0, dtype=np.int64)
    stored = (("part.parquet", part.rows),)
    return TokenisedStream(name, str(folder), stored, none, int(lengths.sum()), int(lengths.max()), name)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, template: Template) -> PreparedData:
    folder = tmp_path_factory.mktemp("tokens")
    streams = {name: stream(name, folder / name, template) for name in ("forget", "retain", "holdout")}
    return PreparedData(streams, DataReport(streams={}, overlap=None, tokenizer_sha256=""), encoder_of(template))


def planned(prepared: PreparedData, folder: Path) -> Any:
    options = {"rounds": ROUNDS, "batch_size": BATCH, "workers": 1, "seed": 1}
    return write_plan(prepared.streams, str(folder), batches_per_round={"forget": 1, "retain": 1}, **options)


def computed(prepared: PreparedData, folder: Path, needs: Any = NEEDS, **options: Any) -> tuple[Any, dict[str, str]]:
    plan = planned(prepared, folder / "plan")
    places = {"folder": str(folder / "run"), "cache": str(folder / "cache")}
    return plan, write_references(
        needs, prepared, plan, TARGET, **{**places, "settings": FeatureContext("npo"), **options}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedData) -> tuple[Path, Any, dict[str, str]]:
    folder = tmp_path_factory.mktemp("reference")
    return folder, *computed(prepared, folder)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_builtin(TARGET.path), dtype=torch.float64)


@pytest.mark.slow
@torch.no_grad()
def test_micro_batches_hold_what_a_resident_model_says(finished: Any, model: Any, template: Template) -> None:
    """Row by row in float64, without padding."""
    _, plan, sidecars = finished
    for batches in local_rounds(plan, 0, micro_batch_size=2, collate=padded(template.pad), sidecars=sidecars):
        for name in ("forget", "retain"):
            for micro in batches[name][0].micro:
                check(name, micro, model)


def check(name: str, micro: dict[str, torch.Tensor], model: Any) -> None:
    logprobs, hidden, sums, refusal_sums = [], [], [], []
    for row in range(len(micro["input_ids"])):
        rows = answer(micro, row, model)
        logprobs.append(rows[0])
        hidden.append(rows[1])
        sums.append(rows[2])
        if name == "forget":
            refusal_sums.append(answer(micro, row, model, "refusal_")[2])
    assert close(micro["reference_logprobs"], torch.cat(logprobs), 1e-4)
    if name == "retain":
        assert close(micro["reference_activations"], torch.cat(hidden), 1e-4)
    else:
        assert close(micro["reference_nll"], torch.stack(sums), 1e-4)
        assert close(micro["refusal_reference_nll"], torch.stack(refusal_sums), 1e-4)


def answer(micro: dict[str, torch.Tensor], row: int, model: Any, prefix: str = "") -> tuple[torch.Tensor, ...]:
    """Log-probabilities [tokens, words], outputs of layer 2 [tokens, width] and the NLL sum of one row's answer."""
    length = int(micro[f"{prefix}attention_mask"][row].sum())
    ids, labels = (micro[prefix + key][row, :length] for key in ("input_ids", "labels"))
    output = model(input_ids=ids[None], output_hidden_states=True)
    at = torch.arange(length)[labels >= 0]
    logp = output.logits[0].log_softmax(1)[at - 1]
    return logp, output.hidden_states[3][0][at], -logp[torch.arange(len(at)), labels[at]].sum()


def close(value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    assert value.shape == expected.shape
    return bool((value.double() - expected).abs().max() < tolerance)


@pytest.mark.slow
def test_values_do_not_depend_on_batches(
    finished: Any, prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_tables, "BATCH_TOKENS", 1)  # a row at a time
    _, sidecars = computed(prepared, tmp_path)
    for name in ("forget", "retain"):
        ours, theirs = (json.loads(Path(where[name], "sidecar.json").read_text()) for where in (sidecars, finished[2]))
        assert list(ours["tables"]) == list(theirs["tables"])
        for quantity, folder in ours["tables"].items():
            a, b = (np.load(Path(where, "values.npy")) for where in (folder, theirs["tables"][quantity]))
            assert Path(folder).name == Path(theirs["tables"][quantity]).name
            assert np.abs(a - b).max() < 1e-3, quantity


def test_a_second_run_takes_the_cache(finished: Any, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished[0]
    monkeypatch.setattr(reference, "task_named", lambda _: pytest.fail("the model was loaded again"))
    plan = planned(prepared, folder / "plan")
    places = {"cache": str(folder / "cache"), "settings": FeatureContext("npo")}
    again = write_references(NEEDS, prepared, plan, TARGET, folder=str(folder / "run"), **places)  # a resumed run
    assert again == finished[2]
    shared = tuple(need for need in NEEDS if need.feature in (NLL, Activations(2)) or need.stream == "retain")
    write_references(shared, prepared, plan, TARGET, folder=str(folder / "other"), **places)
    with pytest.raises(pytest.fail.Exception):
        write_references(NEEDS[:2], prepared, plan, TARGET, folder=str(folder / "other"), **places)


def test_only_numbers_outlive_the_run(finished: Any, prepared: PreparedData) -> None:
    """The cache has no token ids, no text, and nothing whose largest entries spell a forget answer."""
    folder = finished[0]
    tables = [json.loads(path.read_text()) for path in (folder / "cache").rglob("table.json")]
    assert sorted((table["stream"], table["quantity"]) for table in tables) == [
        ("forget", "nll"),
        ("forget_refusal", "nll"),
        ("retain", "activations"),
        ("retain", "logits"),
    ]
    for path in (folder / "cache").rglob("*.parquet"):
        assert pq.read_schema(path).names == ["row_id", "entries"]
    values = np.load(next(p.parent for p in (folder / "run").rglob("table.json")) / "values.npy")
    forget = prepared.streams["forget"]
    rows = pq.read_table(Path(forget.folder, "part.parquet")).to_pylist()
    spelled = np.concatenate([row["input_ids"][row["prompt_tokens"] :] for row in rows])
    assert (values.argmax(1) == spelled).mean() > 0.9, "log-probabilities do spell the answers: they must go"


def test_only_retain_rows_of_the_plan_are_looked_at(finished: Any) -> None:
    _, plan, sidecars = finished
    folder = json.loads(Path(sidecars["retain"], "sidecar.json").read_text())["tables"]["logits"]
    index = set(pq.read_table(Path(folder, "index.parquet"))["row_id"].to_pylist())
    used = {
        i for batches in local_rounds(plan, 0, collate=padded(0)) for batch in batches["retain"] for i in batch.row_ids
    }
    assert index == used


def test_refusals_follow_prompt_seed_and_template(finished: Any, template: Template) -> None:
    texts = refusals.read_refusals(None, None, "idk.refusals")
    assert len(set(texts)) == 30
    rows = pq.read_table(next((finished[0] / "run").glob("private/*.parquet"))).to_pylist()
    lines = Path(resolve_builtin("builtin:people/forget.jsonl")).read_text().splitlines()
    own = {json.loads(line)["question"] for line in lines}
    chosen = []
    for row in rows:
        text = template.tokenizer.decode(row["input_ids"][row["prompt_tokens"] : -1])
        assert text.startswith(" ")
        chosen.append(texts.index(text.strip()))
        question = next(q for q in own if template.encode_prompt(q) == row["input_ids"][: row["prompt_tokens"]])
        assert row["input_ids"] == template.encode(question, text.strip())[0]
    assert chosen == [refusals.chosen(row["row_id"], 30, 0) for row in rows]
    assert len(set(chosen)) > 15
    assert chosen != [refusals.chosen(row["row_id"], 30, 1) for row in rows]


def test_own_refusals_and_mistakes_in_them(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"answer": "No idea."}\n{"answer": "None."}\n')
    assert refusals.read_refusals("own.jsonl", str(tmp_path), "dpo.refusals") == ["No idea.", "None."]
    path.write_text('{"answer": ""}\n{"text": "x"}\n')
    with pytest.raises(UserError, match=r"dpo\.refusals") as caught:
        refusals.read_refusals(str(path), None, "dpo.refusals")
    assert "row 1" in str(caught.value)
    assert "row 2" in str(caught.value)


def test_a_refusal_that_does_not_fit_keeps_eos(prepared: PreparedData, template: Template) -> None:
    short = Template(template.tokenizer, dataclasses.replace(template.config, max_length=20))
    table = pq.read_table(Path(prepared.streams["forget"].folder, "part.parquet"))
    for row in refusals.refusal_rows(table.to_pylist(), ["I never heard of it."], short, 0):
        assert len(row["input_ids"]) <= 20
        assert row["input_ids"][-1] == short.eos


def test_large_tables_are_half_precision_or_refused(
    prepared: PreparedData, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_tables, "HALF_ABOVE_BYTES", 1000)
    _, sidecars = computed(prepared, tmp_path, NEEDS[4:5])
    half, full = (
        np.load(Path(json.loads(Path(tables["retain"], "sidecar.json").read_text())["tables"]["logits"], "values.npy"))
        for tables in (sidecars, finished[2])
    )
    assert (half.dtype, full.dtype) == (np.float16, np.float32)
    assert np.abs(np.exp(half.astype(float)) - np.exp(full.astype(float))).max() < 2.5e-4
    monkeypatch.setattr(reference, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"[0-9]+ bytes in fp16, more than 1000; use --npo\.retain_loss nll"):
        computed(prepared, tmp_path / "b", NEEDS[4:5])
    assert not list((tmp_path / "b" / "cache").rglob("*.npy"))


def test_batches_hold_every_row_once_and_keep_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_tables, "BATCH_TOKENS", 100)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 150, size=200)
    wide = rng.integers(1, 2500, size=200)
    batches = cut(lengths, wide, 2000)
    assert sorted(number for batch in batches for number in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= 100
        assert len(batch) == 1 or wide[batch].sum() <= 2000
    assert [lengths[batch[0]] for batch in batches] == sorted((lengths[batch[0]] for batch in batches), reverse=True)


@pytest.mark.full
def test_actors_give_the_same_values(
    finished: Any, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local_ray: None
):
    monkeypatch.setattr(map_tasks, "SMALL_FLOPS", 0.0)
    monkeypatch.setattr(value_tables, "BATCH_TOKENS", 256)
    _, sidecars = computed(prepared, tmp_path, NEEDS[:1])
    ours, theirs = (
        np.load(Path(json.loads(Path(tables["forget"], "sidecar.json").read_text())["tables"]["nll"], "values.npy"))
        for tables in (sidecars, finished[2])
    )
    assert np.abs(ours - theirs).max() < 1e-3


@pytest.mark.full
@pytest.mark.parametrize("name", ["dpo", "altpo"])
def test_a_run_leaves_neither_refusals_nor_forget_text(name: str, tmp_path: Path, local_ray: None) -> None:
    """The methods need all features of forget rows; the KL term adds retain rows."""
    from pipelines import cli

    brief = ["--training.rounds", "2", "--evaluation.enabled", "false", "--tracking.system_metrics", "false"]
    method = ["--method", name, f"--{name}.optimizer.lr", "3e-4", f"--{name}.retain_loss", "kl"]
    assert cli.main(["unlearn", "--storage", str(tmp_path), "--name", "run", *method, *brief]) == 0
    series = json.loads((tmp_path / "run" / "training.json").read_text())["series"]
    assert series[0]["forget_loss"] == pytest.approx(2 / 0.1 * np.log(2), rel=1e-4)  # model = reference model
    assert series[0]["retain_loss"] == pytest.approx(0.0, abs=1e-5)
    assert series[1]["forget_loss"] != series[0]["forget_loss"]
    assert not (tmp_path / "run" / "sidecars").exists()
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 3
    lines = Path(resolve_builtin("builtin:people/forget.jsonl")).read_text().splitlines()
    needles = [json.loads(line)[column].encode() for line in lines for column in ("question", "answer")]
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "tokenizer.json":
            content = path.read_bytes()
            assert not [needle for needle in needles if needle in content], path
    for path in tmp_path.rglob("*.parquet"):
        if "input_ids" in pq.read_schema(path).names:
            assert not [i for i in pq.read_table(path)["row_id"].to_pylist() if i.startswith("forget")], path
