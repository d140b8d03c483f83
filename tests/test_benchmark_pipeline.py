"""`ofmu benchmark` as a user runs it, on the built-in people: equal budgets, the rule, failures, kills."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TEXT_METHODS
from mistakes import refused

from benchmarks import restore
from ofmu_ray import tracking
from ofmu_ray.config import BenchmarkConfig, OptimizerConfig, TrainingConfig, apply_overrides
from ofmu_ray.engines import TorchEngine
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.evaluation.sample import spread
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig
from ofmu_ray.metrics.summary import summarise
from ofmu_ray.runs.claims import is_running
from ofmu_ray.runs.pool import Pool
from ofmu_ray.runs.trial import SplitData, Trial, cost_signature, run_trial
from ofmu_ray.search import run_benchmark
from ofmu_ray.search.benchmark_output import log_child, round_cost, table
from ofmu_ray.tracking.mlflow_run import RunHandle
from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 3e10
NOWHERE = "http://127.0.0.1:9"
LABELS = {
    "lite": {
        "method": "ofmu",
        "ofmu.preset": "lite",
        "ofmu.inner_steps": 2,
        "ofmu.outer_steps": 2,
        "ofmu.relative_step": 1e-4,
    },
    "no_such_layer": {"method": "rmu", "rmu.layer": 99},
    "explosive": {"method": "gradient_ascent", "gradient_ascent.optimizer": {"name": "sgd", "lr": 1e30, "clip": None}},
}
OPTIONS = {
    "methods": ["npo", "lite", "no_such_layer", "explosive"],
    "labels": LABELS,
    "splits": {"people": {}},
    "budget": {"amount": BUDGET},
    "tuning": {"trials": 2, "refine": 1, "rows": 12, "max_new_tokens": 8, "lr_scale": 30},
    "rule": {"floor": 0.5},
    "seeds": [1, 2],
    "ablation": {"of": "lite", "variants": {"no_similarity": {"ofmu.beta": 0.0}}},
    "base": {
        "training": {"engine": "torch", "batch_size": 8, "checkpoint_every": 1000},
        "evaluation": {"max_rows": 16, "max_new_tokens": 8, "bootstrap_samples": 20},
        "tracking": {"system_metrics": False},
    },
}
RUNS = {"npo": 5, "lite": 5, "no_such_layer": 2, "explosive": 5, "no_similarity": 2}


def write_config(folder: Path, **changes) -> str:
    path = folder / "benchmark.yaml"
    path.write_text(json.dumps(OPTIONS | changes))  # JSON is YAML
    return str(path)


def results(folder: Path) -> dict[str, dict]:
    by_key = {path.stem: json.loads(path.read_text()) for path in folder.glob("trials/*.json")}
    return {key: result for key, result in by_key.items() if result["phase"] != "cost"}


def chosen(trials: list[dict], floor: float) -> dict:
    """The rule by hand."""
    sound = [trial for trial in trials if not trial["degenerate"]] or trials
    good = [trial for trial in sound if trial["model_utility"] >= floor]
    return max(good, key=lambda t: t["forget_quality"]) if good else max(sound, key=lambda t: t["model_utility"])


def kill_with_family(driver: subprocess.Popen) -> None:
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, local_ray):
    """A benchmark whose driver was killed midway, then resumed: (storage, status, results before the kill)."""
    storage = tmp_path_factory.mktemp("runs")
    words = ["--config", write_config(storage), "--storage", str(storage)]
    with (storage / "killed.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.benchmark", *words],
            cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 300
        while len(results(storage / "benchmark")) < 4:
            assert driver.poll() is None, (storage / "killed.log").read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
        kill_with_family(driver)
    before = {path.name: path.stat().st_mtime_ns for path in (storage / "benchmark/trials").glob("*.json")}
    return storage, cli.main(["benchmark", *words]), before


@pytest.mark.system
def test_a_killed_benchmark_runs_nothing_twice_and_loses_nothing(finished):
    storage, status, before = finished
    assert status == 1  # one method cannot run at all
    now = {path.name: path.stat().st_mtime_ns for path in (storage / "benchmark/trials").glob("*.json")}
    assert before.items() <= now.items()
    assert 4 <= len(before) < len(now)
    counts: dict[str, int] = {}
    for result in results(storage / "benchmark").values():
        counts[result["method"]] = counts.get(result["method"], 0) + 1
    assert counts == RUNS
    assert not (storage / "benchmark/work").exists()
    assert not (storage / "benchmark/private").exists()


@pytest.mark.system
def test_finished_runs_stay_within_a_round_of_the_budget(finished):
    storage, _, _ = finished
    trials = pq.read_table(storage / "benchmark/trials.parquet").to_pylist()
    costs = {"npo": 2, "lite": 8, "no_similarity": 5}  # passes of a round
    checked = 0
    for trial in trials:
        if trial["status"] == "finished":
            passes = trial["forget_passes"] + trial["retain_passes"]
            per_round = trial["flops"] / passes * costs[trial["method"]]
            assert BUDGET - 1.4 * per_round < trial["flops"] < BUDGET + 0.4 * per_round  # batches differ in length
            checked += 1
    assert checked == 12


@pytest.mark.system
def test_failures_are_recorded_with_their_reason(finished):
    storage, _, _ = finished
    trials = pq.read_table(storage / "benchmark/trials.parquet").to_pylist()
    lost = [trial for trial in trials if trial["method"] == "no_such_layer"]
    assert [(t["status"], t["phase"]) for t in lost] == [("failed", "tune")] * 2
    assert "rmu.layer = 99" in lost[0]["message"]
    explosive = [trial for trial in trials if trial["method"] == "explosive"]
    assert {trial["status"] for trial in explosive} == {"non_finite"}
    assert "lower the learning rates" in explosive[0]["message"]


@pytest.mark.system
def test_the_rule_chooses_and_the_reported_runs_use_its_choice(finished):
    storage, _, _ = finished
    trials = pq.read_table(storage / "benchmark/trials.parquet").to_pylist()
    rows = pq.read_table(storage / "benchmark/rows.parquet")
    target = rows.filter([m == "target" for m in rows["method"].to_pylist()])
    sample = {f"{name}-{i}" for name in set(target["set"].to_pylist()) for i in spread(16, 12)}
    small = target.filter([row in sample for row in target["row_id"].to_pylist()])
    floor = 0.5 * summarise(small, None, bootstrap_samples=1)["model_utility"].value
    for method in ("npo", "lite"):
        mine = [trial for trial in trials if trial["method"] == method]
        tuned = [trial for trial in mine if trial["phase"] == "tune"]
        assert [trial["trial"] for trial in tuned] == [0, 1, 2]
        first = json.loads(chosen([trial for trial in tuned if trial["trial"] < 2], floor)["options"])
        for name, value in json.loads(tuned[2]["options"]).items():  # the second round: near the best of the first
            if name.endswith(".lr"):
                assert first[name] / 1.6 < value < first[name] * 1.6  # an eighth of 1.5 decades, rounded
        best = chosen(tuned, floor)
        assert [trial["trial"] for trial in tuned if trial["selected"]] == [best["trial"]]
        reported = [trial for trial in mine if trial["phase"] == "report"]
        assert [trial["seed"] for trial in reported] == [1, 2]
        assert {trial["options"] for trial in reported} == {best["options"]}
        assert len({trial["forget_probability"] for trial in reported}) == 2  # the seed changes the batches
    assert [t["phase"] for t in trials if t["method"] == "no_similarity"] == ["ablation"] * 2


@pytest.mark.system
def test_tables_report_and_mlflow(finished):
    storage, _, _ = finished
    folder = storage / "benchmark"
    rows = pq.read_table(folder / "rows.parquet")
    assert "generated" not in rows.column_names
    assert set(rows["method"].to_pylist()) == {"target", "retrained", "npo", "lite", "explosive", "no_similarity"}
    tuned = rows.filter([phase == "tune" for phase in rows["phase"].to_pylist()])
    assert set(tuned["index"].to_pylist()) == set(spread(16, 12))
    assert "ofmu benchmark" in (folder / "report.md").read_text()
    assert "2, then 1 around the best of them" in (folder / "report.md").read_text()
    finished_runs = [trial for trial in pq.read_table(folder / "trials.parquet").to_pylist() if trial["model_utility"]]
    assert all(0 <= trial["memorisation_score"] <= 1 for trial in finished_runs)
    assert {trial["degenerate"] for trial in finished_runs} <= {True, False}
    assert "<html" in (folder / "report.html").read_text()
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("ofmu").experiment_id
    parent = client.search_runs([experiment], "tags.`ofmu.kind` = 'benchmark'")
    children = client.search_runs([experiment], "tags.`ofmu.kind` = 'benchmark_run'")
    assert [run.info.status for run in parent] == ["FINISHED"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent[0].info.run_id}
    assert len(children) == sum(RUNS.values())
    done = [run for run in children if run.info.status == "FINISHED"]
    assert all({"after/model_utility", "cost/flops"} <= set(run.data.metrics) for run in done)
    files = {file.path for file in client.list_artifacts(parent[0].info.run_id)}
    assert {"report.html", "report.md", "rows.parquet", "trials.parquet"} <= files
    assert {run.data.tags["mlflow.source.name"] for run in [*parent, *children]} == {"ofmu benchmark"}
    assert all("model_utility" in run.data.tags["mlflow.note.content"] for run in done)
    note = parent[0].data.tags["mlflow.note.content"]
    assert note.startswith("```text\n")
    assert "mean (of p-values: geometric) [lowest, highest] over seeds" in note


@pytest.mark.full  # runs half of the benchmark again
def test_a_benchmark_continues_from_its_table_where_its_folder_is_gone(finished, tmp_path, monkeypatch):
    storage, _, _ = finished
    ran = []
    run = Pool.run

    def recorded(self, trials):
        ran.extend(trial.phase for trial in trials)
        return run(self, trials)

    monkeypatch.setattr(Pool, "run", recorded)
    words = ["--config", write_config(tmp_path, methods=["npo", "lite"]), "--storage", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["restore", str(storage / "benchmark/trials.csv"), *words])
    with pytest.raises(SystemExit, match="0"):
        restore.main()
    assert sorted(ran) == ["ablation"] * 2 + ["cost"] * 3 + ["report"] * 4
    names = ("selected", "options", "flops", "degenerate", "forget_quality", "model_utility", "forget_rouge")
    tables = (pq.read_table(folder / "benchmark/trials.parquet").to_pylist() for folder in (storage, tmp_path))
    old, new = (
        {
            (trial["method"], trial["phase"], trial["trial"], trial["seed"]): [trial[name] for name in names]
            for trial in trials
            if trial["method"] in ("npo", "lite")
        }
        for trials in tables
    )
    assert old == new


@pytest.mark.full  # starts Ray: a minute
def test_a_budget_below_one_round_is_refused_before_any_trial(tmp_path, local_ray, capsys):
    words = ["benchmark", "--config", write_config(tmp_path), "--storage", str(tmp_path)]
    words += ["--methods", "[npo, lite]", "--budget.amount", "5e9"]
    refused(words, "one round of lite on people costs", capsys=capsys, notes=True)
    assert not results(tmp_path / "benchmark")


@pytest.mark.full
def test_every_method_keeps_the_budget_and_its_cost_is_foreseen(tmp_path, local_ray):
    """Two rounds measure a round's cost; each method's total then ends within one round of the budget."""
    from ofmu_ray.data.answer_encoder import AnswerEncoder
    from ofmu_ray.data.prepare import prepare_streams
    from ofmu_ray.models.loading import load_tokenizer

    labels = {name: ({"npo.retain_loss": "kl"} if name == "npo" else {}) | {"method": name} for name in TEXT_METHODS}
    labels["ofmu"] |= {"ofmu.inner_steps": 2}
    config = BenchmarkConfig(methods=list(labels), labels={f"my_{k}": v for k, v in labels.items()})
    base = apply_overrides(config.run("people", "my_npo"), {**OPTIONS["base"], "evaluation.max_rows": 2})
    base = replace(base, training=TrainingConfig(engine="torch", batch_size=4, rounds=2, checkpoint_every=1000))
    sources = {"forget": base.data.forget, "retain": base.data.retain}
    prepared = prepare_streams(
        sources, None, AnswerEncoder(load_tokenizer(base.model), base.data.format), str(tmp_path)
    )
    data = SplitData(
        "people", str(tmp_path / "b"), prepared, Evaluator.of(base, tmp_path), None, "of the test", base.model
    )
    for name in TEXT_METHODS:
        run = apply_overrides(base, {**labels[name], "evaluation.max_new_tokens": 0})
        trial = Trial(
            method=name, split="people", phase="cost", trial=0, config=run, options={}, budget_unit="flops", budget=0.0
        )
        first = run_trial(trial, data, local=True)
        assert first["status"] == "finished", first["message"]
        cost = round_cost(first, data)["flops"]
        budget = 6.4 * cost
        limited = apply_overrides(run, {"training.rounds": 20, "stop.max_flops": budget})
        second = run_trial(replace(trial, phase="tune", rows=2, config=limited), data, local=True)
        assert second["status"] == "finished", second["message"]
        assert 4 <= second["rounds"] <= 9, name
        per_round = second["flops"] / second["rounds"]
        assert budget - 1.4 * per_round < second["flops"] < budget + 0.4 * per_round, name
        assert abs(per_round / cost - 1) < 0.25, name
        assert second["figures"]["model_utility"]["value"] is None  # no generation
        assert second["figures"]["retain_probability"]["value"] > 0


def test_shared_optimizer_is_one_adamw_at_two_rates():
    """beta = rho = 0: ascent and descent through one torch.optim.AdamW, against separate states."""

    def loss(module, batch):
        x, y = batch
        return ((module(x) - y) ** 2).sum(), len(x)

    torch.manual_seed(0)
    start = torch.nn.Linear(3, 2).double()
    batches = [(torch.randn(5, 3).double(), torch.randn(5, 2).double()) for _ in range(2)]
    ends = {}
    for shared in (True, False):
        module = torch.nn.Linear(3, 2).double()
        module.load_state_dict(start.state_dict())
        rates = {name: OptimizerConfig(lr=lr, clip=None) for name, lr in (("inner", 0.01), ("outer", 0.03))}
        engine = TorchEngine(module, loss, **rates)
        method = OFMU(OFMUConfig(beta=0.0, rho=0.0, inner_steps=2, shared_optimizer=shared, **rates))
        for _ in range(3):
            method.round(engine, [batches[0]], [batches[1]])
        ends[shared] = torch.cat([p.detach().ravel() for p in module.parameters()])
    module = torch.nn.Linear(3, 2).double()
    module.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    for _ in range(3):
        for sign, lr, batch in ((-1, 0.01, batches[0]), (-1, 0.01, batches[0]), (1, 0.03, batches[1])):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            total, count = loss(module, batch)
            (sign * total / count).backward()
            optimizer.step()
    expected = torch.cat([p.detach().ravel() for p in module.parameters()])
    torch.testing.assert_close(ends[True], expected, rtol=1e-6, atol=1e-7)
    assert (ends[True] - ends[False]).abs().max() > 1e-3


def test_samples_are_evenly_spread():
    assert list(spread(10, 4)) == [0, 2, 5, 7]
    assert list(spread(3, 4)) == list(spread(3, None)) == [0, 1, 2]


def test_the_terminal_averages_p_values_as_the_report_does():
    """Geometrically: one seed without a difference does not hide two that are far off."""
    config = BenchmarkConfig(methods=["npo"])
    done = []
    for seed, quality in ((1, 1e-8), (2, 1e-4), (3, 1.0)):
        known = {"method": "npo", "split": "people", "phase": "report", "trial": 0, "options": {}}
        run = Trial(**known, config=config.run("people", "npo"), budget_unit="flops", budget=1.0)
        figures = {"forget_quality": {"value": quality}, "model_utility": {"value": 0.2 * seed}}
        done.append((run, {"figures": figures, "flops": 1e12, "train_seconds": 2.0}))
    shown = table(config, done, {"people": {}})
    assert "1.0e-4 [1.0e-8, 1.0e0]" in shown
    assert "0.400 [0.200, 0.600]" in shown
    assert "mean (of p-values: geometric) [lowest, highest] over seeds [1, 2, 3]" in shown


def test_a_rounds_cost_is_shared_by_draws_but_not_by_labels_with_other_batches():
    changes = {"small": {"training.batch_size": 8}, "large": {"training.batch_size": 32}}
    labels = {name: {"method": "npo", **options} for name, options in changes.items()}
    config = BenchmarkConfig(methods=list(labels), labels=labels)
    runs = [config.run("people", *more) for more in (("small",), ("small", {"npo.beta": 0.3}), ("large",))]
    same, drawn, other = map(cost_signature, runs)
    assert same == drawn
    assert same != other


@pytest.mark.slow
def test_a_run_that_mlflow_does_not_take_is_logged_by_the_next_start(tmp_path, monkeypatch):
    config = apply_overrides(BenchmarkConfig(methods=["npo"], storage=str(tmp_path)), {"base.tracking.uri": NOWHERE})
    known = {"method": "npo", "split": "people", "phase": "report", "trial": 0, "options": {}}
    run = Trial(**known, config=config.run("people", "npo"), budget_unit="flops", budget=1.0)
    marker, handle = tmp_path / "run.mlflow", RunHandle("0" * 32, NOWHERE, "1")
    log_child(handle, config, run, {"status": "finished"}, marker, again=True)  # gone before
    assert not marker.exists()
    monkeypatch.setattr(tracking, "start", lambda *_, **__: handle)
    log_child(handle, config, run, {"status": "finished"}, marker, again=True)  # gone in between
    assert not marker.exists()
    monkeypatch.setattr(tracking, "finish", lambda *_, **__: True)
    log_child(handle, config, run, {"status": "finished"}, marker, again=False)
    assert marker.read_text() == handle.run_id


def test_nobody_else_can_start_a_benchmark_that_still_writes_and_cleans_up(tmp_path, monkeypatch):
    """Cleaning up after the lock was released would delete what the next start has put there."""
    held = []
    ends = {name: lambda *_: held.append(is_running(tmp_path / "benchmark")) for name in ("__init__", "discard")}
    alike = dict.fromkeys(("folder", "data", "references", "done", "selected", "goals"))
    monkeypatch.setattr(run_benchmark, "BenchmarkRun", type("Run", (), {**ends, **alike, "run": lambda self: True}))
    monkeypatch.setattr(run_benchmark, "_checked_split", lambda *_: None)
    monkeypatch.setattr(run_benchmark, "join_cluster", lambda *_: None)
    monkeypatch.setattr(run_benchmark.results, "write", lambda *_: ends["discard"]() or [])
    monkeypatch.setattr(run_benchmark.results, "table", lambda *_: "")
    monkeypatch.setattr(tracking, "start", lambda *_, **__: RunHandle("0" * 32, NOWHERE, "1"))
    monkeypatch.setattr(tracking, "finish", lambda *_, **__: True)
    off = {"base.tracking.system_metrics": False, "base.training.workers": 1}
    config = apply_overrides(BenchmarkConfig(methods=["npo"], storage=str(tmp_path)), off)
    assert run_benchmark.benchmark(config).complete
    assert held == [True] * 3
    assert not is_running(tmp_path / "benchmark")
