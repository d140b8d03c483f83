"""Evaluation by a run's workers, on the model that they hold together, gives what its export gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from engine_ranks import run_ranks
from evaluation_models import tiny_model, tiny_tokenizer
from live_ranks import CONFIG, SETS, SGD, Case, evaluations, step, worker_of, write_source
from test_evaluation import _assert_same
from tiers import asked, tiered

from ofmu_ray.cluster import map_tasks
from ofmu_ray.config import (
    DataConfig,
    EvaluationConfig,
    FormatConfig,
    LoraConfig,
    ModelConfig,
    TrainingConfig,
    UnlearnConfig,
    config_hash,
    outcome_hash,
)
from ofmu_ray.engines import TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.evaluation.rows import evaluation_rows
from ofmu_ray.evaluation.runner import loading_of
from ofmu_ray.models.loading import load_causal_lm
from ofmu_ray.runs.who_evaluates import check_device_map, evaluates_live
from ofmu_ray.tasks import task_named

SHARDED = TrainingConfig(engine="deepspeed", workers=2, zero_stage=3)
NAMES = tiered(["trees", "plain"], quick=lambda name: name == "trees")


@pytest.fixture(scope="module")
def live(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Case], dict[str, Any]]:
    tests = (
        test_two_ranks_at_zero_3_evaluate_what_is_in_the_files,
        test_ranks_share_the_rows_and_step_together,
        test_stages_of_a_sweep_are_evaluated_by_all_ranks,
    )
    wanted = {"trees", *(name for test in tests for name in asked(request, test.__name__, "name"))}
    folder = str(tmp_path_factory.mktemp("live"))
    made = [
        Case("trees", folder, stored=torch.bfloat16),  # rounded on export
        Case("plain", folder, model="qwen2_sliding", lora=LoraConfig(rank=2)),  # a row's texts do not share a pass
    ]
    made = [case for case in made if case.name in wanted]
    return {case.name: case for case in made}, run_ranks(2, made, tmp_path_factory.mktemp("ranks"), evaluations)


def table(case: Case, label: str) -> pa.Table:
    found, seconds = case.live.table(label)
    assert seconds > 0
    return found


@pytest.mark.system
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_at_zero_3_evaluate_what_is_in_the_files(name: str, live: Any) -> None:
    case, measured = live[0][name], live[1][name]
    for label, folder, other in (("before", case.source, case.exported), ("after", case.exported, case.source)):
        expected = case.evaluator.table(str(folder), label)
        _assert_same(table(case, label), expected, rel=2e-4)
        retrained = case.evaluator.table(str(other), "retrained")
        same = [case.evaluator.metrics(rows, retrained) for rows in (table(case, label), expected)]
        assert len(same[0]) > 20, same[0]
        for metric, value in same[1].items():
            if value["value"] is not None:
                assert same[0][metric]["value"] == pytest.approx(value["value"], rel=1e-3, abs=1e-4), metric
    assert len({json.dumps(table(case, label)["answer_nll"].to_pylist()) for label in ("before", "after")}) == 2
    assert table(case, "after")["set"].unique().to_pylist() == list(SETS)
    assert measured["as_it_was"]
    assert measured["in_training_mode"]
    assert measured["whole"] == []


@pytest.mark.system
@pytest.mark.parametrize("name", NAMES)
def test_ranks_share_the_rows_and_step_together(name: str, live: Any) -> None:
    first, second = live[1][name]["passes"]
    assert first["own"] != second["own"]  # or nothing would be joined
    assert first["all"] == second["all"]
    assert first["all"] < first["own"] + second["own"]


@pytest.mark.system
@pytest.mark.parametrize("name", NAMES)
def test_stages_of_a_sweep_are_evaluated_by_all_ranks(name: str, live: Any) -> None:
    case, results = live[0][name], live[1][name]["figures"]
    expected = case.evaluator.metrics(table(case, "before"), None)
    for metric, value in results.items():
        if value["value"] is not None:
            assert value["value"] == pytest.approx(expected[metric]["value"], rel=1e-6), metric
    assert results["forget_probability"]["value"] > 0


@pytest.mark.system
def test_the_workers_table_serves_the_cache(live: Any, tmp_path: Path) -> None:
    case = live[0]["trees"]
    evaluator = replace(case.evaluator, cache=tmp_path)
    assert evaluator.stored(str(case.exported)) is None
    evaluator.store(str(case.exported), table(case, "after"))
    assert evaluator.stored(str(case.exported)).equals(table(case, "after"))
    assert evaluator.table(str(case.exported), "after").equals(table(case, "after"))  # not run again
    assert replace(evaluator, reveal_text=True).stored(str(case.exported)) is None  # a cache has no private text
    other = replace(evaluator, evaluation=replace(CONFIG, dtype="bf16"))
    assert other.stored(str(case.exported)) is None


@pytest.mark.slow
def test_one_process_evaluates_what_it_holds(tmp_path: Path) -> None:
    case = Case("one", str(tmp_path), stored=torch.bfloat16)
    write_source(case)
    config = ModelConfig(path=str(case.source))
    module, tokenizer = load_causal_lm(config)
    engine = TorchEngine(module, inner=SGD, outer=SGD)
    worker = worker_of(engine, module, tokenizer, config, 0)
    case.live.begin(worker)
    _assert_same(table(case, "before"), case.evaluator.table(str(case.source), "before"), rel=2e-4)
    step(engine, 0)
    weights = engine.full_weights()
    assert weights is not None
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())
    worker.state.status = "stopped"
    case.live.end(worker)
    assert case.live.table("after") == (None, 0.0)
    worker.state.status = "finished"
    case.live.end(worker)
    assert all(torch.equal(value, value.bfloat16().float()) for value in (engine.full_weights() or {}).values())
    assert table(case, "after")["answer_nll"] != table(case, "before")["answer_nll"]
    worker.state.round = 1
    case.live.begin(worker)  # a run that resumes later is not before its first round
    assert table(case, "before")["answer_nll"] != table(case, "after")["answer_nll"]


# --------------------------------------------------------------------------------------------------------- alone


@pytest.mark.slow
def test_a_model_laid_out_by_accelerate_gives_the_same_values(tmp_path: Path) -> None:
    """On this machine's only device; the hooks that move tensors between devices are there all the same."""
    import accelerate

    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    made = {
        device_map: loading_of(tmp_path, tmp_path, FormatConfig(), max_new_tokens=12, device_map=device_map)
        for device_map in (None, "auto")
    }
    plain, spread = (loading.scorer("cuda" if loading.device_map else "cpu") for loading in made.values())
    accelerate.dispatch_model(spread.model, {"": "cpu"}, force_hooks=True)
    assert spread.model.hf_device_map == {"": "cpu"}
    assert spread.model._hf_hook is not None
    assert spread.shares_prompts
    rows = evaluation_rows("retain", SETS["retain"], FormatConfig())
    _assert_same(spread.rows(rows, batch_size=2), plain.rows(rows, batch_size=2))
    assert made[None].host_bytes == 4 * sum(parameter.numel() for parameter in plain.model.parameters())


def test_models_of_a_comparison_have_one_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {dtype: str(tmp_path / str(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    for dtype, folder in folders.items():
        tiny_model("llama").to(dtype).save_pretrained(folder)
    fp32, bf16, fp16 = folders.values()
    data, auto = DataConfig(), EvaluationConfig()

    def types(models: tuple[str, ...], evaluation: EvaluationConfig = auto, exported: str = "auto") -> set[torch.dtype]:
        made = Evaluator(evaluation, data, bf16, tmp_path, models=models, exported=exported)
        return {made.dtype(model) for model in models}

    assert types((bf16, fp32)) == {torch.float32}
    assert types((bf16,), EvaluationConfig(dtype="bf16")) == {torch.bfloat16}
    monkeypatch.setattr(map_tasks, "device_kind", lambda: "cuda")
    assert types((bf16,)) == {torch.bfloat16}
    assert types((bf16, fp32)) == {torch.float32}
    assert types((bf16, fp16)) == {torch.float32}  # neither holds the other's values
    assert types((bf16,), exported="fp32") == {torch.float32}
    assert types((fp32, bf16), EvaluationConfig(dtype="bf16")) == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------- before a start


def config(engine: str = "auto", precision: str = "fp32", **changes: Any) -> UnlearnConfig:
    evaluation = EvaluationConfig(**({"engine": engine, "retrained": None} | changes))
    return UnlearnConfig(model=ModelConfig(precision=precision), evaluation=evaluation)  # type: ignore[arg-type]


def evaluation_of(made: UnlearnConfig, tmp_path: Path) -> Any:
    return task_named(made.task).evaluation(made, tmp_path)


@pytest.mark.parametrize(
    ("made", "training", "wanted"),
    [
        (config(), SHARDED, True),
        (config(), replace(SHARDED, zero_stage=2), False),
        (config(), TrainingConfig(), False),
        (config("live"), replace(SHARDED, zero_stage=2), True),
        (config("live"), TrainingConfig(), True),
        (config("process"), SHARDED, False),
        (config(enabled=False), SHARDED, False),
        (config(precision="bf16"), SHARDED, False),  # a CPU evaluates in fp32
        (config(precision="bf16"), replace(SHARDED, gpus_per_worker=1.0), True),
        (config(precision="bf16_autocast"), SHARDED, True),
    ],
)
def test_who_evaluates(made: UnlearnConfig, training: TrainingConfig, wanted: bool, tmp_path: Path) -> None:
    assert evaluates_live(made, training, evaluation_of(made, tmp_path)) is wanted


def test_no_worker_waits_for_another_ones_evaluation_between_rounds(tmp_path: Path) -> None:
    made = config()
    evaluation = evaluation_of(made, tmp_path)
    for training, wanted in ((replace(SHARDED, zero_stage=0), True), (TrainingConfig(), False)):
        assert evaluates_live(made, training, evaluation, on_the_way=True) is wanted


def test_what_workers_cannot_evaluate_is_refused_before_the_start(tmp_path: Path) -> None:
    made = config("live", "bf16")
    with pytest.raises(UserError, match=r"engine = live: the workers hold bf16.*--evaluation.engine process"):
        evaluates_live(made, SHARDED, evaluation_of(made, tmp_path))
    made = config("live", dtype="fp16")
    with pytest.raises(UserError, match=r"hold fp32 weights, but evaluation.dtype = fp16; use --evaluation.dtype auto"):
        evaluates_live(made, SHARDED, evaluation_of(made, tmp_path))
    made = config("live")
    with pytest.raises(UserError, match=r"task = 'causal_lm' evaluates only models that one process holds"):
        evaluates_live(made, SHARDED, object())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"evaluation.device_map = auto .* there is none: drop it"):
        check_device_map(EvaluationConfig(device_map="auto"))


def test_where_an_evaluation_runs_is_not_part_of_what_comes_out() -> None:
    plain = UnlearnConfig()
    for changes in ({"engine": "live"}, {"engine": "process"}, {"device_map": "auto"}):
        other = replace(plain, evaluation=replace(plain.evaluation, **changes))
        assert outcome_hash(other) == outcome_hash(plain)
        assert config_hash(other) == config_hash(plain)
    assert outcome_hash(replace(plain, evaluation=replace(plain.evaluation, dtype="bf16"))) != outcome_hash(plain)
