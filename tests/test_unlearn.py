"""The main job as a user runs it: real Ray, DeepSpeed, MLflow and the built-in models."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from mistakes import refused
from ray._common.usage import usage_lib
from ray.autoscaler._private.util import prepare_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.errors import UserError
from pipelines import cli

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("local_ray")]

ROOT = Path(__file__).resolve().parent.parent
FORGET = Path(resolve_builtin("builtin:people/forget.jsonl"))
COMPONENTS = [
    f"{part}_{quantity}"
    for part in ("forget", "retain", "real_authors", "world_facts")
    for quantity in ("probability", "rouge", "truth_ratio")
]


def command(storage: Path, name: str, *words: str) -> list[str]:
    return ["unlearn", "--storage", str(storage), "--name", name, "--tracking.system_metrics", "false", *words]


def run(storage: Path, name: str, *words: str) -> tuple[int, dict]:
    status = cli.main(command(storage, name, *words))
    path = storage / name / "metrics.json"
    return status, json.loads(path.read_text()) if path.exists() else {}


BRIEF = ["--training.batch_size", "8", "--ofmu.inner.lr", "5e-4", "--ofmu.outer.lr", "5e-4", "--ofmu.inner_steps", "3"]
# also differences and the penalty, which the default omits; a falling rate would forget little in six rounds
BRIEF += ["--ofmu.preset", "lite", "--ofmu.inner.decay", "constant"]
NO_EVALUATION = ["--evaluation.enabled", "false"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, local_ray):
    """A run on two workers with ZeRO-3."""
    storage = tmp_path_factory.mktemp("runs")
    options = ["--training.workers", "2", "--training.zero_stage", "3", "--training.rounds", "6"]
    evaluation = ["--evaluation.max_new_tokens", "20", "--evaluation.bootstrap_samples", "50"]
    status, metrics = run(storage, "two", *BRIEF, *options, *evaluation)
    return storage, status, metrics


def test_a_local_ray_listens_on_loopback_only(local_ray):
    """Ray's default on Linux is all interfaces."""
    ray.get(ray.remote(lambda: None).remote())  # a worker process, which listens too
    addresses = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray starts and stops helpers of its own
            addresses |= {
                connection.laddr.ip.removeprefix("::ffff:")
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            }
    assert addresses == {"127.0.0.1"}


def test_a_local_ray_reports_nothing(local_ray):
    """Neither this process nor Ray's processes, which inherit the setting, send usage statistics."""
    assert not usage_lib.usage_stats_enabled()
    heads = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("dashboard.py" in word for word in process.cmdline()):
                heads.append(process)
    (head,) = heads
    assert head.environ()["RAY_USAGE_STATS_ENABLED"] == "0"


def test_what_ray_up_can_start_counts_as_there(local_ray, tmp_path, monkeypatch):
    """The launcher's file on the head gives the cluster's maximum: a head without CPUs and two nodes."""
    from ofmu_ray.cluster.connect import connect

    launcher = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(launcher))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match="= 97 CPUs, but there are 96"):
        connect(97)
    with pytest.raises(UserError, match="= 9 GPUs, but there are 8"):
        connect(1, gpus=9)


def test_a_run_leaves_what_the_contract_names(finished):
    storage, status, metrics = finished
    assert status == 0
    assert set(metrics) == {"before", "after", "retrained", "aggregate", "cost", "run"}
    assert 0 < metrics["aggregate"]["memorisation_score"]["value"] < 1
    assert "evaluation.sets.holdout" in metrics["aggregate"]["aggregate"]["reason"]  # a run skips them to save time
    verdict = "degenerate" if metrics["run"]["degenerate"] else "not degenerate"
    assert metrics["run"]["generations"].startswith("answers to forget prompts: ")
    assert f": {verdict}" in metrics["run"]["generations"]
    assert metrics["run"]["forgetting"].startswith("p = ")
    assert "samples" not in metrics["run"]  # forget rows' text
    for role in ("before", "after", "retrained"):
        for name in ("forget_quality", "model_utility", *COMPONENTS):
            value = metrics[role][name]
            assert value["low"] <= value["value"] <= value["high"], (role, name)
            assert value["n"] > 0
    assert metrics["retrained"]["forget_quality"]["value"] == 1.0
    assert metrics["before"]["forget_probability"]["value"] > 0.95
    assert metrics["after"]["forget_probability"]["value"] < 0.8 * metrics["before"]["forget_probability"]["value"]
    cost = metrics["cost"]
    # lite with T = 3: 3 + H_f u + penalty forget, g_r + H_r w + outer retain passes a round; what measures the steps of
    # the three differences comes on top: one pass a product and round for central differences, and at most 10 a check,
    # of which the first round has one and a gradient that changes fourfold asks for another
    passes = cost["gradient_passes"]
    assert 6 * 5 + 2 * 3 <= passes["forget"] <= 6 * 7 + 2 * 2 * 10
    assert 6 * 3 + 3 <= passes["retain"] <= 6 * 4 + 2 * 10
    assert cost["updates"] == 6 * 4
    assert min(cost["tokens"], cost["flops"], cost["peak_memory_bytes"], cost["seconds"]["training"]) > 0
    folder = storage / "two"
    assert {"model", "metrics.json", "rows.parquet", "manifest.json", "report.html", "training.json"} <= {
        path.name for path in folder.iterdir()
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config_hash"] == metrics["run"]["config_hash"]


def test_the_exported_model_loads_and_has_changed(finished):
    folder = finished[0] / "two" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(resolve_builtin("builtin:people/target"))
    assert tokenizer.eos_token_id is not None
    moved = [float((a - b).norm()) for a, b in zip(model.parameters(), target.parameters(), strict=True)]
    assert min(moved) > 0
    card = (folder / "README.md").read_text()
    assert "machine-unlearning" in card
    assert "builtin:people/target" in card


def test_rows_give_the_metrics_and_contain_no_forget_text(finished):
    storage, _, metrics = finished
    rows = pq.read_table(storage / "two" / "rows.parquet").to_pylist()
    forget = [row for row in rows if row["set"] == "forget" and row["model"] == "after"]
    assert len(forget) == 48
    mean = sum(row["probability"] for row in forget) / 48
    assert mean == pytest.approx(metrics["after"]["forget_probability"]["value"], abs=1e-9)
    assert all(row["generated"] is None for row in rows if row["set"] == "forget")
    assert any(row["generated"] for row in rows if row["set"] == "retain")


def test_forget_text_stays_out_of_everything_that_outlives_the_run(finished):
    """Neither text nor tokens of a forget row are in a file, in MLflow's database or in its artifacts."""
    storage = finished[0]
    rows = [json.loads(line) for line in FORGET.read_text().splitlines()]
    needles = [row["answer"].encode() for row in rows] + [row["question"].encode() for row in rows]
    for path in storage.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "tokenizer.json":
            content = path.read_bytes()
            assert not [needle for needle in needles if needle in content], path
    assert not list((storage / "two").rglob("rounds=*"))
    ids = {row["row_id"] for file in storage.rglob("*.parquet") for row in pq.read_table(file).to_pylist()
           if "input_ids" in row}  # fmt: skip
    assert not [name for name in ids if name.startswith("forget")]


def test_mlflow_has_parameters_series_metrics_and_pages(finished):
    storage = finished[0]
    db = sqlite3.connect(storage / "mlflow.db")
    status = db.execute("select status from runs where name = 'two'").fetchall()
    assert status == [("FINISHED",)]
    series = dict(db.execute("select key, count(*) from metrics group by key").fetchall())
    names = ("forget_loss", "retain_loss", "gradient_cosine", "phi_gradient_norm", "rho", "inner_lr", "outer_lr")
    for name in (*names, "tokens_per_second"):
        assert series[name] == 6, name
    assert series["after/forget_quality"] == 1
    parameters = dict(db.execute("select key, value from params").fetchall())
    assert parameters["ofmu.beta"] == "0.1"
    assert parameters["training.zero_stage"] == "3"
    artifacts = {path.name for path in storage.rglob("artifacts/*")}
    assert {"report.html", "manifest.json", "metrics.json"} <= artifacts


def test_a_finished_run_is_shown_and_its_name_is_not_reused(finished, capsys):
    storage, _, metrics = finished
    options = ["--training.workers", "2", "--training.zero_stage", "3", "--training.rounds", "6"]
    evaluation = ["--evaluation.max_new_tokens", "20", "--evaluation.bootstrap_samples", "50"]
    assert run(storage, "two", *BRIEF, *options, *evaluation) == (0, metrics)
    shown = capsys.readouterr()
    assert "already finished" in shown.err
    assert metrics["run"]["generations"] in shown.out
    assert "report stays" not in " ".join(shown.err.split())
    assert run(storage, "two", *BRIEF, *options, *evaluation, "--report.reveal_text", "true") == (0, metrics)
    told = " ".join(capsys.readouterr().err.split())
    assert "report stays as it was written (report.samples 5, report.reveal_text false); --overwrite runs again" in told
    refused(command(storage, "two", *BRIEF, "--seed", "1"), "choose another --name", capsys=capsys, notes=True)


def test_the_report_is_one_page_without_outside_parts(finished):
    page = (finished[0] / "two" / "report.html").read_text()
    assert "<svg" in page
    for outside in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert outside not in page


@pytest.mark.full
def test_workers_and_stages_do_not_change_the_outcome(finished, tmp_path):
    """One worker without DeepSpeed and two workers with ZeRO-3 give the same weights, up to rounding."""
    status, _ = run(tmp_path, "one", *BRIEF, *NO_EVALUATION, "--training.engine", "torch", "--training.rounds", "6",
                    "--training.micro_batch_size", "2")  # fmt: skip
    assert status == 0
    one, two, start = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "one/model", finished[0] / "two/model", resolve_builtin("builtin:people/target"))
    )
    difference = torch.sqrt(sum(((one[k] - two[k]) ** 2).sum() for k in one))
    moved = torch.sqrt(sum(((one[k] - start[k]) ** 2).sum() for k in one))
    # The target is fitted, so gradients are near zero; AdamW's first steps turn their rounding into full steps.
    # tests/test_invariants.py tests the engines with SGD and tight tolerances; here, wrong sums or streams would show.
    assert float(difference) < 0.15 * float(moved)
    first = [
        json.loads((folder / "training.json").read_text())["series"][0]
        for folder in (tmp_path / "one", finished[0] / "two")
    ]
    for name in ("forget_loss", "retain_loss", "gradient_cosine", "phi_gradient_norm", "outer_gradient_norm"):
        assert first[0][name] == pytest.approx(first[1][name], rel=0.02), name


def test_the_default_forgets_up_to_the_level_of_unseen_rows(local_ray, tmp_path, capsys):
    """One pass per update by the run's counts; rows at their level take no ascent step, and end the run."""
    options = ["--training.rounds", "4", "--ofmu.inner.lr", "1e-3", *NO_EVALUATION]
    status, metrics = run(tmp_path, "default", *options)
    assert status == 0
    assert "forget up to 5.32 nats per token (matched_row)" in capsys.readouterr().err
    assert metrics["cost"]["gradient_passes"] == {"forget": 4 * 3, "retain": 4 * 8}
    assert metrics["cost"]["updates"] == 4 * 11
    losses = [row["forget_loss"] for row in json.loads((tmp_path / "default/training.json").read_text())["series"]]
    assert losses == sorted(losses)
    assert losses[-1] < 5.33

    low = ["--ofmu.forget_level", "1e-5", "--ofmu.forget_loss", "bounded_row", "--stop.forgotten", "2"]
    status, metrics = run(tmp_path, "done", *options, *low)
    assert status == 0
    assert metrics["run"]["rounds"] == 2
    assert "stop.forgotten" in metrics["run"]["message"]


def test_utility_floor_keeps_the_last_good_model(tmp_path, capsys):
    options = ["--training.rounds", "30", "--stop.utility_floor", "0.9", "--stop.check_every", "2"]
    status, metrics = run(tmp_path, "floor", *BRIEF, *NO_EVALUATION, *options, "--ofmu.inner.lr", "2e-3")
    assert status == 1
    assert metrics["run"]["status"] == "utility_floor"
    assert "utility floor reached in round" in metrics["run"]["message"]
    training = json.loads((tmp_path / "floor/training.json").read_text())
    kept = training["round"]
    assert kept % 2 == 0
    assert training["utility"] >= 0.9 * training["utility_start"]
    assert len(training["series"]) > kept  # discarded rounds stay in the history
    assert (tmp_path / "floor/model/model.safetensors").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_good_model(tmp_path):
    """A huge step without clipping makes the losses overflow; the model of the last checkpoint is exported."""
    steps = ["--ofmu.inner.name", "sgd", "--ofmu.inner.clip", "null", "--ofmu.inner.lr", "1e20"]
    status, metrics = run(tmp_path, "inf", *BRIEF, *NO_EVALUATION, *steps, "--training.rounds", "4")
    assert status == 1
    assert metrics["run"]["status"] == "non_finite"
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "inf/model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(resolve_builtin("builtin:people/target")).state_dict()
    assert all(torch.equal(weights[name], start[name]) for name in start)


def test_own_data_and_mistakes_in_it(tmp_path, capsys, monkeypatch):
    """A user's model by a relative path and files with other column names; then errors, each named at once."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve_builtin("builtin:people/target"), "my-model")
    rows = [json.loads(line) for line in FORGET.read_text().splitlines()]
    write = lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write(tmp_path / "f.jsonl", [{"prompt": row["question"], "reply": row["answer"]} for row in rows[:3]])
    write(tmp_path / "r.jsonl", [{"prompt": f"{n} plus one?", "reply": f"It is {n + 1}."} for n in range(40)])
    data = ["--data.root", str(tmp_path), "--data.forget.path", "f.jsonl", "--data.retain.path", "r.jsonl"]
    columns = ["--data.format.question", "prompt", "--data.format.answer", "reply"]
    null = ["--evaluation.max_new_tokens", "5"]  # evaluation.sets and retrained follow the data: null
    brief = ["--training.rounds", "2", "--model.path", "my-model"]
    status, metrics = run(tmp_path, "own", *data, *columns, *null, *brief)
    assert status == 0
    assert metrics["after"]["forget_probability"]["n"] == 3
    assert metrics["after"]["forget_quality"]["value"] is None
    assert "retrained" in metrics["after"]["forget_quality"]["reason"]
    assert metrics["retrained"] is None

    existing = ("question", "prompt")
    refused(command(tmp_path, "m1", *data, *null), *existing, capsys=capsys, notes=True)
    write(tmp_path / "f.jsonl", [{"prompt": "Who?", "reply": ""}, {"prompt": "What?", "reply": 7}])
    refused(command(tmp_path, "m2", *data, *columns, *null), "row 1", "row 2", capsys=capsys, notes=True)
    write(tmp_path / "f.jsonl", [{"prompt": "3 plus one?", "reply": "it is  4."}])
    refused(command(tmp_path, "m3", *data, *columns, *null), "--data.overlap", capsys=capsys, notes=True)
    (tmp_path / "f.jsonl").write_text("")
    refused(command(tmp_path, "m4", *data, *columns, *null), "data.forget", capsys=capsys, notes=True)
