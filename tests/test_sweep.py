"""`ofmu sweep` as a user runs it, on the built-in people: killed, resumed, reproduced, and with mistakes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from mistakes import refused
from mlflow_server import mlflow_server

from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {
    "label": "ofmu_lite",
    "lr_scale": 30,
    "space": {"ofmu.inner_steps": "integer(1, 2)", "ofmu.outer_steps": "integer(1, 3)"},
    "search": {"kind": "tpe", "trials": 4, "startup_trials": 2},
    "early": {"kind": "asha", "stages": 3},
    "select": {
        "objective": "forget_probability",
        "utility": "retain_probability",
        "utility_floor": 0.5,
        "rows": 12,
        "max_new_tokens": 0,
    },
    "concurrency": 1,
    "base": {
        "training": {"engine": "torch", "rounds": 6, "batch_size": 8, "checkpoint_every": 2},
        "evaluation": {"max_rows": 16, "max_new_tokens": 8, "bootstrap_samples": 20},
        "tracking": {"system_metrics": False},
    },
}


def write_config(folder: Path, **changes) -> str:
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(OPTIONS | changes))  # JSON is YAML
    return str(path)


def results(folder: Path) -> dict[int, dict]:
    """The trials' results by number, without fresh seeds."""
    contents = [json.loads(path.read_text()) for path in folder.glob("trials/*.json")]
    return {result["trial"]: result for result in contents if result["phase"] == "tune"}


def without_times(result: dict) -> dict:
    """A trial's result, without the times."""
    cost = ("flops", "forget_passes", "retain_passes", "rounds", "status", "message", "options", "figures")
    steps = [(one["stage"], one["figures"]) for one in result["evaluations"]]
    return {name: result.get(name) for name in cost} | {"evaluations": steps}


def killed_in_the_second_trial(words: list[str], storage: Path) -> dict[str, bytes]:
    """Start a sweep, and SIGKILL its driver with all its processes after its second trial's first evaluation; returns
    the results and evaluations written so far."""
    folder = storage / "sweep"
    with (storage / "killed.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.sweep", *words],
            cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 300
        # the finished trial's evaluations stay a moment longer than its result
        while not (len(results(folder)) == 1 and stages_of_unfinished(folder)):
            assert driver.poll() is None, (storage / "killed.log").read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.01)
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.wait()
    files = [*folder.glob("trials/*.json"), *stages_of_unfinished(folder)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stages_of_unfinished(folder: Path) -> list[Path]:
    """Evaluations of trials without a result."""
    ended = {path.stem for path in folder.glob("trials/*.json")}
    return [path for path in folder.glob("work/*/stages/*.json") if path.parent.parent.name not in ended]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, local_ray):
    """Storage of an undisturbed sweep."""
    storage = tmp_path_factory.mktemp("calm")
    interrupts = signal.getsignal(signal.SIGINT)
    assert cli.main(["sweep", "--config", write_config(storage), "--storage", str(storage)]) == 0
    assert signal.getsignal(signal.SIGINT) is interrupts  # Tune's handler would swallow the next Ctrl-C
    return storage


@pytest.fixture(scope="module")
def killed(tmp_path_factory, local_ray):
    """(storage of a killed and resumed sweep, its files at the kill)."""
    storage = tmp_path_factory.mktemp("killed")
    words = ["--config", write_config(storage), "--storage", str(storage)]
    before = killed_in_the_second_trial(words, storage)
    assert cli.main(["sweep", *words]) == 0
    return storage, before


@pytest.mark.full
def test_a_killed_sweep_loses_nothing_runs_nothing_twice_and_ends_alike(calm, killed):
    killed, before = killed
    folder = killed / "sweep"
    for name, content in before.items():
        if name.startswith("trials/"):
            assert (folder / name).read_bytes() == content
    now, undisturbed = results(folder), results(calm / "sweep")
    assert sorted(now) == [0, 1, 2, 3]
    assert {number: without_times(result) for number, result in now.items()} == {
        number: without_times(result) for number, result in undisturbed.items()
    }
    [first] = [content for name, content in before.items() if name.endswith("stages/0001.json")]
    assert now[1]["evaluations"][0] == json.loads(first)  # from before the kill, and not repeated
    best = [yaml.safe_load((path / "sweep/best.yaml").read_text())["ofmu"] for path in (calm, killed)]
    assert best[0] == best[1]
    assert {path.name for path in folder.iterdir()} >= {"best", "best.yaml", "trials.parquet", "report.html"}
    assert not {"work", "private", "tune", "checkpoints"} & {path.name for path in folder.iterdir()}


@pytest.mark.system
def test_no_text_of_forget_rows_outlives_a_sweep(calm):
    rows = [json.loads(line) for line in (ROOT / "ofmu_ray/assets/people/forget.jsonl").read_text().splitlines()]
    answers = [row["answer"].encode() for row in rows]
    files = [path for path in calm.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not [answer for answer in answers if answer in content], path


@pytest.mark.system
def test_only_the_best_models_stay_on_disk(calm):
    models = list((calm / "sweep/models").iterdir())
    chosen = json.loads((calm / "sweep/sweep.json").read_text())["chosen"]["number"]
    numbers = {path.stem: json.loads(path.read_text())["trial"] for path in (calm / "sweep/trials").glob("*.json")}
    assert [numbers[path.name] for path in models] == [chosen]


@pytest.mark.system
def test_trials_that_are_behind_end_early(calm):
    by_number = results(calm / "sweep")
    stopped = [result for result in by_number.values() if result["status"] == "stopped"]
    assert stopped, "successive halving ended no trial"
    for result in stopped:
        assert "figures" not in result
        assert result["rounds"] == 2 * len(result["evaluations"]) < 6
        assert not [name for name in result if name.startswith("checkpoint")]
    assert any(result["rounds"] == 6 for result in by_number.values())


@pytest.mark.system
def test_mlflow_holds_the_sweep_and_each_trial_once(calm):
    client = mlflow.MlflowClient(f"sqlite:///{calm}/mlflow.db")
    [experiment] = [one for one in client.search_experiments() if one.name == "ofmu"]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if run.data.tags.get("ofmu.kind") == "sweep"]
    children = {int(run.data.params["trial"]): run for run in runs if run.data.tags.get("ofmu.kind") == "trial"}
    assert parent.info.status == "FINISHED"
    assert sorted(children) == [0, 1, 2, 3]
    assert len(runs) == 5
    by_number = results(calm / "sweep")
    for number, run in children.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["mlflow.source.name"] == "ofmu sweep"
        assert "forget_probability" in run.data.tags["mlflow.note.content"]
        assert run.data.tags["ofmu.status"] == by_number[number]["status"]
        assert float(run.data.params["ofmu.inner.lr"]) == by_number[number]["options"]["ofmu.inner.lr"]
        assert run.data.metrics["cost/flops"] == by_number[number]["flops"]
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "forget_passes")]
        assert steps == list(range(1, by_number[number]["rounds"] + 1))
        stages = [point.step for point in client.get_metric_history(run.info.run_id, "stage/forget_probability")]
        assert stages == [2 * (index + 1) for index in range(len(by_number[number]["evaluations"]))]
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert names >= {"report.html", "best.yaml", "plane.svg"}
    tags = parent.data.tags
    assert 0 < parent.data.metrics["after/retain_probability"] < 1, "the chosen trial's"
    assert re.search(r"^chosen: trial \d; on all rows:$", tags["mlflow.note.content"], re.MULTILINE)
    assert tags["mlflow.source.name"] == "ofmu sweep"
    assert tags["ofmu.command"].startswith("ofmu sweep --config ")
    assert {"mlflow.user", "mlflow.source.git.commit"} <= tags.keys()


@pytest.mark.system
def test_the_chosen_configuration_reproduces_the_chosen_model(calm, capsys):
    """`ofmu unlearn --config best.yaml` gives all metrics of the trial's exported model."""
    assert cli.main(["unlearn", "--config", str(calm / "sweep/best.yaml")]) == 0
    again = json.loads((calm / "sweep-best/metrics.json").read_text())["after"]
    assert again == json.loads((calm / "sweep/best/metrics.json").read_text())["after"]


@pytest.mark.full
def test_a_floor_that_no_trial_meets(killed, capsys):
    """The rule may change without running trials again; its floor may be out of reach."""
    killed, _ = killed
    before = {path.name: path.stat().st_mtime_ns for path in (killed / "sweep/trials").glob("*.json")}
    words = ["--config", str(killed / "sweep.yaml"), "--storage", str(killed), "--select.utility_floor", "1"]
    assert cli.main(["sweep", *words]) == 1
    shown = capsys.readouterr().out
    assert "Pareto front" in shown
    assert "no trial has retain_probability >= " in shown
    assert "the nearest:\n  trial " in shown
    assert before == {path.name: path.stat().st_mtime_ns for path in (killed / "sweep/trials").glob("*.json")}
    assert not (killed / "sweep/best.yaml").exists()


@pytest.mark.full
def test_more_trials_and_fresh_seeds_continue_the_same_sweep(calm):
    words = ["--config", str(calm / "sweep.yaml"), "--storage", str(calm)]
    assert cli.main(["sweep", *words, "--search.trials", "5", "--select.seeds", "[11]"]) == 0
    assert sorted(results(calm / "sweep")) == [0, 1, 2, 3, 4]
    rows = pq.read_table(calm / "sweep/trials.parquet").to_pylist()
    [confirmed] = [row for row in rows if row["phase"] == "confirm"]
    assert confirmed["seed"] == 11
    assert confirmed["forget_probability"] is not None


@pytest.mark.full
def test_a_failing_trial_and_a_killed_process_do_not_end_a_sweep(tmp_path, local_ray):
    """Two concurrent trials, tracked by a server: one names a layer that does not exist, the other's process is killed
    and it resumes."""
    space = {"rmu.layer": "choice(1, 99)", "rmu.optimizer.lr": "choice(1e-4)"}
    with mlflow_server(tmp_path) as server:
        changes = {
            "label": "rmu",
            "space": space | {"rmu.steering": None, "rmu.retain_weight": None},
            "concurrency": 2,
            "search": {"kind": "random", "trials": 5},
            "early": {"kind": "none", "stages": 3},
            "base": OPTIONS["base"] | {"tracking": {"system_metrics": False, "uri": server.uri}},
        }
        words = ["--config", write_config(tmp_path, **changes), "--storage", str(tmp_path)]
        driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.sweep", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 300
        while not list((tmp_path / "sweep").glob("work/*/stages/0001.json")):
            assert driver.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        killed = 0
        for process in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ResourceTrainable" in " ".join(process.cmdline()):
                    process.kill()
                    killed += 1
        shown, _ = driver.communicate(timeout=300)
        runs = mlflow.MlflowClient(server.uri).search_runs(["1"])
    assert killed
    assert driver.returncode == 0, shown[-3000:]
    assert "the space contains only 2 different trials" in shown
    by_number = results(tmp_path / "sweep")
    by_layer = {result["options"]["rmu.layer"]: result for result in by_number.values()}
    assert by_layer[1]["status"] == "finished"
    assert [one["stage"] for one in by_layer[1]["evaluations"]] == [1, 2]
    assert by_layer[99]["status"] == "failed"
    assert "rmu.layer = 99" in by_layer[99]["message"]
    tracked = {run.data.params.get("rmu.layer"): run for run in runs if run.data.tags["ofmu.kind"] == "trial"}
    assert {layer: run.info.status for layer, run in tracked.items()} == {"1": "FINISHED", "99": "FAILED"}
    assert "rmu.layer = 99" in tracked["99"].data.tags["ofmu.message"]
    assert len(runs) == 3


@pytest.mark.full
def test_a_population_continues_from_its_best(tmp_path, local_ray):
    """Two members, two generations: the second starts from the first's weights, with its own options."""
    search = {"kind": "population", "trials": 4, "population": 2}
    words = ["--config", write_config(tmp_path, search=search, concurrency=2), "--storage", str(tmp_path)]
    status = cli.main(["sweep", *words])
    by_number = results(tmp_path / "sweep")
    lines = [json.loads(line) for line in (tmp_path / "sweep/suggestions.jsonl").read_text().splitlines()]
    parents = {line["number"]: line["parent"] for line in lines}
    assert parents[0] is None
    assert parents[1] is None
    assert {parents[2], parents[3]} <= {0, 1}
    assert not any(name in lines[0]["options"] for name in ("ofmu.inner_steps", "ofmu.outer_steps"))
    for number in (0, 1):
        assert (by_number[number]["status"], by_number[number]["rounds"]) == ("stopped", 3)
    for number in (2, 3):
        assert (by_number[number]["status"], by_number[number]["rounds"]) == ("finished", 6)
        assert by_number[number]["flops"] == pytest.approx(2 * by_number[parents[number]]["flops"], rel=0.2)
    assert status == (0 if (tmp_path / "sweep/best.yaml").exists() else 1)


@pytest.mark.full
def test_trials_of_several_workers_are_evaluated_on_their_way(tmp_path, local_ray):
    """ZeRO-3 on two workers through Ray Train, which evaluate their shards: the same metrics as one worker."""
    space = {"gradient_ascent.optimizer.lr": "choice(1e-3)"}
    search, early = {"kind": "random", "trials": 1}, {"kind": "median", "stages": 2}
    metrics = []
    for name, training in (
        ("one", {"engine": "torch"}),
        ("two", {"engine": "deepspeed", "workers": 2, "zero_stage": 3}),
    ):
        base = OPTIONS["base"] | {"training": OPTIONS["base"]["training"] | training}
        changes = {"name": name, "label": "gradient_ascent", "space": space, "search": search, "early": early}
        cli.main(["sweep", "--config", write_config(tmp_path, **changes, base=base), "--storage", str(tmp_path)])
        [result] = results(tmp_path / name).values()
        assert result["status"] == "finished"
        [evaluation] = result["evaluations"]
        metrics.append([evaluation["figures"], result["figures"]])
    for one, two in zip(*metrics, strict=True):
        for name in ("forget_probability", "retain_probability", "forget_truth_ratio"):
            assert two[name]["value"] == pytest.approx(one[name]["value"], abs=1e-4)
        assert one["forget_probability"]["value"] < 0.999  # the run did something


@pytest.mark.system
def test_trials_that_have_no_room_beside_each_other(tmp_path, capsys, local_ray):
    words = ["sweep", "--config", write_config(tmp_path), "--storage", str(tmp_path), "--concurrency", "64"]
    refused(words, "concurrency = 64: ", "set --concurrency 2", capsys=capsys, notes=True)
    assert not (tmp_path / "sweep/trials").exists()


@pytest.mark.system
def test_a_sweep_keeps_its_name_for_one_configuration(calm, capsys):
    words = ["--config", str(calm / "sweep.yaml"), "--storage", str(calm), "--base.training.rounds", "7"]
    message = "name = 'sweep': a run with another configuration has this name"
    refused(["sweep", *words], message, capsys=capsys, notes=True)
