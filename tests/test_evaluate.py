"""`ofmu evaluate` as a user runs it: real Ray, MLflow and the built-in models."""

import html
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from evaluation_models import tiny_model, tiny_tokenizer
from mistakes import refused
from s3_server import s3_server

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.attacks import measurement as measurements
from ofmu_ray.cluster import map_tasks
from ofmu_ray.commandline.parse import parse
from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.runs.claims import locked
from ofmu_ray.runs.finished_comparison import inputs_digest
from pipelines import cli

TARGET = "builtin:people/target"
SMALL = {"max_rows": 10, "max_new_tokens": 8, "bootstrap_samples": 40}
CHECKS = {
    "relearn": {"rows": 4, "steps": [1, 3], "lr": 1e-3, "batch_size": 4},
    "quantise": {"bits": [8, 4]},
    "prefix": {"shots": 1, "prefixes": ["Tell me: {question}"]},
    "alignment": True,
    "gradient_norm": True,
    "choice": [{"name": "sums", "path": "sums.jsonl"}, {"name": "texts", "path": "sums.jsonl", "scoring": "cloze"}],
}
TABLES = 7 + 6  # checks of the target; those of the retrained model, which is not aligned with itself
SETS = 5 + 6  # forget, retain, real_authors, world_facts, holdout, and three probes' two sides


pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with multiple-choice questions."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": f"{n} plus 1?", "choices": [str(n), str(n + 1)], "answer": n % 2} for n in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(storage: Path, *words: str, **config: Any) -> list[str]:
    """The command's words, with a configuration file that is written."""
    config = {"name": "e", "storage": str(storage), "tracking": {"system_metrics": False}, **config}
    config["evaluation"] = {**SMALL, **config.get("evaluation", {})}
    storage.mkdir(exist_ok=True)
    file = storage / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["evaluate", "--config", str(file), *words]


def run(storage: Path, *words: str, **config: Any) -> tuple[int, dict[str, Any]]:
    """Its exit status and metrics.json."""
    status = cli.main(command(storage, *words, **config))
    path = storage / "e" / "metrics.json"
    return status, json.loads(path.read_text()) if status == 0 else {}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the attacks that run in this process, in order."""
    kinds: list[str] = []
    real = measurements.measure

    def measure(check: Any, device: str) -> Any:
        kinds.append(check.kind)
        return real(check, device)

    monkeypatch.setattr(measurements, "measure", measure)
    return kinds


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, data: Path, local_ray: None
) -> tuple[Path, dict[str, Any], list[str], int]:
    """All attacks on the built-in models. The evaluation is killed in the fourth attack and then resumed."""
    storage, kinds = tmp_path_factory.mktemp("runs"), []
    real = measurements.measure

    def measure(check: Any, device: str) -> Any:
        kinds.append(check.kind)
        if len(kinds) == 4:
            raise KeyboardInterrupt
        return real(check, device)

    everything = {"data": {"root": str(data)}, "checks": CHECKS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "measure", measure)
        assert run(storage, **everything)[0] == 130
        assert not (storage / "e" / "metrics.json").exists()
        assert status_of(storage) == ["KILLED"]
        kept = len(list((storage / "cache/checks").glob("*.parquet")))
        status, metrics = run(storage, **everything)
    assert status == 0
    return storage, metrics, kinds, kept


def status_of(storage: Path) -> list[str]:
    return [status for (status,) in sqlite3.connect(storage / "mlflow.db").execute("select status from runs")]


def assert_close(value: Any, expected: Any, place: str = "") -> None:
    """The same values, up to rounding."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), place
        for key in expected:
            assert_close(value[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=2e-4, abs=1e-5), place
    else:
        assert value == expected, place


@pytest.mark.system
def test_every_attack_has_metrics_for_every_model(finished: Any) -> None:
    metrics = finished[1]
    assert set(metrics) == {"models", "checks", "weights_sha256", "config"}
    assert set(metrics["models"]) == {"target", "retrained"}
    for name in ("forget_quality", "model_utility", "mia_gradient_norm_auc", "privleak", "multihop_utility"):
        value = metrics["models"]["target"][name]
        assert value["low"] <= value["value"] <= value["high"], name
    assert list(metrics["checks"]) == ["relearn", "quantise", "prefix", "alignment", "choice/sums", "choice/texts"]
    target, retrained = (
        {check: by_model.get(label) for check, by_model in metrics["checks"].items()}
        for label in ("target", "retrained")
    )
    assert retrained["alignment"] is None
    plain = metrics["models"]["target"]["forget_probability"]["value"]
    assert target["quantise"]["forget/full"]["value"] == pytest.approx(plain, rel=1e-5)
    assert target["prefix"]["probability/plain"]["value"] == pytest.approx(plain, rel=1e-5)
    groups = {group: target["relearn"][f"{group}/step_0"] for group in ("forget", "attacked")}
    assert (groups["forget"]["n"], groups["attacked"]["n"]) == (6, 4)
    assert (groups["forget"]["value"] * 6 + groups["attacked"]["value"] * 4) / 10 == pytest.approx(plain, rel=1e-5)
    attacked = retrained["relearn"]
    assert attacked["attacked/step_3"]["value"] > attacked["attacked/step_0"]["value"]
    assert attacked["forget/height_beyond_retrained"]["value"] == 0
    assert target["choice/sums"]["accuracy"]["n"] == 6
    assert 0 < target["alignment"]["cka/forget/mean"]["value"] < 1


@pytest.mark.system
def test_a_killed_evaluation_resumes(finished: Any) -> None:
    storage, _, kinds, kept = finished
    assert kept == 3
    assert len(kinds) == 4 + TABLES - 3  # the fourth one, in which it was killed, ran again
    assert status_of(storage) == ["FINISHED"]  # the same run of MLflow
    assert len(list((storage / "cache/checks").glob("*.parquet"))) == TABLES
    assert len(list((storage / "cache/evaluation").glob("*.parquet"))) == 2 * SETS


@pytest.mark.system
def test_a_second_evaluation_runs_nothing(
    finished: Any,
    data: Path,
    counted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage, metrics, _, _ = finished
    monkeypatch.setattr("ofmu_ray.evaluation.runner.run_units", lambda *_: pytest.fail("a set was evaluated again"))
    rows = pq.read_table(storage / "e" / "rows.parquet")
    (storage / "e" / "evaluated.json").unlink()  # as if it had been killed at the very end
    status, again = run(storage, data={"root": str(data)}, checks=CHECKS)
    assert (status, again, counted) == (0, metrics, [])
    assert pq.read_table(storage / "e" / "rows.parquet").equals(rows)
    verdicts = verdict_lines(capsys)
    assert any(line.startswith("target: p = ") for line in verdicts)
    assert any(line.startswith("target: answers to forget prompts: ") for line in verdicts)
    page = (storage / "e" / "report.html").read_text()
    assert all(html.escape(line.partition(": ")[2], quote=False) in page for line in verdicts)
    written = (storage / "e" / "report.html").stat().st_mtime_ns
    status, again = run(storage, data={"root": str(data)}, checks=CHECKS)
    assert (status, again) == (0, metrics)
    assert (storage / "e" / "report.html").stat().st_mtime_ns == written
    assert verdict_lines(capsys) == verdicts


def verdict_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the terminal says of a model in words, below the table."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("target: ", "retrained: "))]


def test_two_evaluations_of_one_name_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "e"):
        refused(command(tmp_path), "is running", capsys=capsys)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_finished_evaluation_is_read_until_an_input_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(Path(resolve_builtin("builtin:people/forget.jsonl")).read_bytes())
    words = ["--storage", str(tmp_path / "runs"), "--name", "e", "--evaluation.max_rows", "4"]
    words += ["--evaluation.max_new_tokens", "0", "--evaluation.sets.forget", str(rows)]
    page = tmp_path / "runs/e/report.html"

    def evaluated(*more: str) -> bool:
        """Whether the command measured instead of reading what is there."""
        before = page.stat().st_mtime_ns if page.exists() else 0
        assert cli.main(["evaluate", *words, *more]) == 0
        table = capsys.readouterr().out.partition("\nreport")[0]
        shown.append(table[table.index("Forget probability") :])
        return page.stat().st_mtime_ns != before

    shown: list[str] = []
    assert evaluated()
    assert not evaluated()
    assert shown[0] == shown[1]
    assert evaluated("--seed", "1")
    assert evaluated()
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    assert evaluated()
    assert shown[-1] != shown[0]
    page.unlink()
    assert evaluated()


def test_what_a_finished_evaluation_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's base counts; a hub name, a URI or a file that is not there may be anything."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter"):
        Path(name).mkdir()
        (Path(name) / "model.safetensors").write_text("x")
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "../base"}')

    def digest(model: str, *words: str) -> str | None:
        options = ["--models", json.dumps({"a": model}), "--evaluation.retrained", "null", *words]
        return inputs_digest(parse(EvaluateConfig, options, "x"))

    before = digest("adapter")
    assert before is not None
    assert digest("adapter") == before
    (tmp_path / "base/model.safetensors").write_text("another")
    assert digest("adapter") not in (None, before)
    assert digest("base", "--tracking.uri", "http://127.0.0.1:5000") is not None
    assert digest("base", "--data.format.system_prompt", "") is not None
    for model in ("gpt2", "owner/name", "s3://bucket/model"):
        assert digest(model) is None, model
    assert digest("base", "--evaluation.sets.forget", "nowhere.jsonl", "--data.root", "s3://bucket") is None

    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr("ofmu_ray.__file__", str(package / "__init__.py"))
    digests = set()
    for name in ("metrics.py", "page.html.j2"):  # with another code or page, results are made again
        (package / name).write_text("")
        digests.add(digest("base"))
    assert len(digests - {None}) == 2


@pytest.mark.full
def test_actors_tasks_and_batch_size_change_nothing_but_rounding(
    finished: Any, data: Path, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache: sets by two actors, attacks by processes, three rows at a time."""
    monkeypatch.setattr(map_tasks, "SMALL_FLOPS", 0.0)
    some = {name: CHECKS[name] for name in ("relearn", "prefix", "alignment", "gradient_norm", "choice")}
    changed = {"actors": 2, "batch_size": 3}
    status, metrics = run(tmp_path, data={"root": str(data)}, checks=some, evaluation=changed)
    assert (status, counted) == (0, [])
    assert_close(metrics["models"], finished[1]["models"])
    assert_close(metrics["checks"], {name: finished[1]["checks"][name] for name in metrics["checks"]})
    assert len(metrics["checks"]) == 5


@pytest.mark.system
def test_no_text_of_forget_rows_is_left_anywhere(finished: Any) -> None:
    storage = finished[0]
    folder = Path(resolve_builtin("builtin:people"))
    files = [folder / "forget_perturbed.jsonl", *folder.glob("probes_*_forget.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()[:10]]
    needles = {row[column].encode() for row in rows for column in ("question", "answer")}
    assert len(needles) > 60
    looked = 0
    for path in storage.rglob("*"):
        if path.is_file():
            looked += 1
            tables = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else []
            content = path.read_bytes() + json.dumps(tables, ensure_ascii=False).encode()
            assert not [needle for needle in needles if needle in content], path
    assert looked > 2 * SETS + TABLES
    private = [row for row in pq.read_table(storage / "e/rows.parquet").to_pylist() if "forget" in row["set"]]
    assert private
    assert all(row["generated"] is None for row in private)


@pytest.mark.system
def test_page_and_mlflow_show_metrics_and_attacks(finished: Any) -> None:
    storage, metrics, _, _ = finished
    page = (storage / "e" / "report.html").read_text()
    for words in ("Forgetting", "Membership inference", "Relearning attack", "Rounded weights", "Other ways to ask",
                  "Alignment with the retrained model", "Multiple choice: sums", "Gradient norm AUC"):  # fmt: skip
        assert words in page, words
    assert "<pre>ofmu evaluate --config " in page  # the command, to be run again
    assert "src=" not in page
    assert "href=" not in page
    database = sqlite3.connect(storage / "mlflow.db")
    (run_id,) = database.execute("select run_uuid from runs where status = 'FINISHED'").fetchone()
    tags = dict(database.execute("select key, value from tags where run_uuid = ?", (run_id,)).fetchall())
    assert tags["ofmu.command"].startswith("ofmu evaluate --config ")
    assert tags["mlflow.source.name"] == "ofmu evaluate"
    assert "target: p = " in tags["mlflow.note.content"]
    logged = dict(database.execute("select key, value from latest_metrics").fetchall())
    for label in ("target", "retrained"):
        for name in ("forget_quality", "model_utility"):
            assert logged[f"{label}/{name}"] == pytest.approx(metrics["models"][label][name]["value"])
        assert logged[f"{label}/relearn/forget/step_3"] == pytest.approx(
            metrics["checks"]["relearn"][label]["forget/step_3"]["value"]
        )


@pytest.mark.full
def test_an_evaluation_in_an_object_store(
    tmp_path: Path, finished: tuple[Path, dict[str, Any], list[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache, rows and page are in the bucket, and the values are those of a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        words = ["--storage", f"{server.bucket}/runs", "--name", "e", "--tracking.uri", f"sqlite:///{tmp_path}/m.db"]
        words += [word for name, value in SMALL.items() for word in (f"--evaluation.{name}", str(value))]
        assert cli.main(["evaluate", *words]) == 0
        kept = server.keys("runs/cache")
        names = ("evaluated.json", "metrics.json", "mlflow.json", "report.html", "rows.parquet")
        assert server.keys("runs/e/") == [f"runs/e/{name}" for name in names]
        for label, values in json.loads(server.read("runs/e/metrics.json"))["models"].items():
            measured = {name: value for name, value in values.items() if value["value"] is not None}
            assert "model_utility" in measured
            assert_close(measured, {name: finished[1]["models"][label][name] for name in measured})
        assert cli.main(["evaluate", *words]) == 0
        assert server.keys("runs/cache") == kept


@pytest.mark.full
def test_the_numbers_are_those_of_a_runs_end(tmp_path: Path) -> None:
    """The exported model alone, without the run's cache."""
    storage = tmp_path / "run"
    words = ["--storage", str(storage), "--name", "u", "--training.rounds", "2", "--training.engine", "torch",
             "--ofmu.inner.lr", "5e-4", "--tracking.system_metrics", "false"]  # fmt: skip
    words += [word for name, value in SMALL.items() for word in (f"--evaluation.{name}", str(value))]
    assert cli.main(["unlearn", *words]) == 0
    ended = json.loads((storage / "u" / "metrics.json").read_text())
    sets = {"holdout": None, "probes": []}
    models = {"before": TARGET, "after": str(storage / "u" / "model")}
    status, alone = run(
        tmp_path / "alone", models=models, evaluation={"sets": sets, "retrained": "builtin:people/retrained"}
    )
    assert status == 0
    assert ended["after"]["forget_probability"] != ended["before"]["forget_probability"]
    for label in ("before", "after", "retrained"):
        assert alone["models"][label] == ended[label], label


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fewer tokens and layers than the built-in ones and with its own tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_has_its_own_tokenizer(tiny: Path, tmp_path: Path) -> None:
    sets = {"holdout": None, "probes": [], "real_authors": None, "world_facts": None}
    brief = {"sets": sets, "max_rows": 2, "max_new_tokens": 2, "retrained": None}
    status, both = run(tmp_path, models={"target": TARGET, "tiny": str(tiny)}, evaluation=brief)
    assert status == 0
    assert "different tokenizers" in (tmp_path / "e/report.html").read_text()
    status, alone = run(tmp_path / "alone", models={"tiny": str(tiny)}, evaluation=brief)
    assert alone["models"]["tiny"] == both["models"]["tiny"]
    assert "different tokenizers" not in (tmp_path / "alone/e/report.html").read_text()


def test_representations_are_compared_with_each_models_own_tokens(tmp_path: Path) -> None:
    """The same weights behind a tokenizer without a chat template: other tokens, so not quite alike."""
    from ofmu_ray.config import FormatConfig
    from ofmu_ray.evaluation.rows import EvaluationRow
    from ofmu_ray.evaluation.runner import loading_of

    def loading(prompt: str) -> Any:
        fmt = FormatConfig(prompt_template=prompt)
        return loading_of(resolve_builtin(TARGET), resolve_builtin(TARGET), fmt, max_new_tokens=2)

    rows = [EvaluationRow("forget", n, f"What is {n}?", f"It is the number {n}.") for n in range(6)]
    plain, other = loading("{question}"), loading("Question: {question} Answer:")
    options = {"samples": 5, "seed": 0}

    def aligned(reference: Any) -> pa.Table:
        check = measurements.Check("alignment", plain, "w", {"forget": rows}, options, reference, "w")
        return check.key("cpu"), measurements.measure(check, "cpu")

    (key, same), (other_key, differing) = aligned(plain), aligned(other)
    assert key != other_key
    assert same["cosine"].to_pylist() == pytest.approx([1.0] * same.num_rows)
    assert min(differing["cosine"].to_pylist()) < 0.999


def test_models_that_do_not_go_together(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"target": TARGET, "tiny": str(tiny)}
    words = command(tmp_path, models=models, checks={"alignment": True})
    refused(words, "models.tiny has 2 layers, evaluation.retrained 4", capsys=capsys)
    refused(command(tmp_path, models=models, tokenizer=TARGET), "models.tiny", "320 tokens", capsys=capsys)
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    words = command(tmp_path, models={"target": TARGET, "bare": str(bare)})  # takes the first model's tokenizer
    refused(words, "models.bare", "320 tokens", capsys=capsys)
    words = command(tmp_path, models={"bare": str(bare)}, evaluation={"retrained": None})
    refused(words, "--tokenizer", capsys=capsys)


def test_a_classifier_asks_for_its_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ofmu_ray.config import ClassifierConfig, TrainConfig
    from ofmu_ray.models.classifiers import write_initial_classifier

    write_initial_classifier(tmp_path / "resnet", TrainConfig(classifier=ClassifierConfig(architecture="resnet8")))
    parts = ("is an image classifier", "--task image_classification")
    words = command(tmp_path / "e", models={"a": str(tmp_path / "resnet")})
    refused(words, "models.a = ", *parts, capsys=capsys)
    words = command(tmp_path / "e", evaluation={"retrained": str(tmp_path / "resnet")})
    refused(words, "evaluation.retrained = ", *parts, capsys=capsys)


def test_the_harness_is_asked_for_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(command(tmp_path, checks={"lm_eval": ["wmdp"]}), "ofmu-ray[lm-eval]", capsys=capsys)


def test_metrics_of_many_models_fit_mlflow(tmp_path: Path) -> None:
    """MLflow takes 1000 metrics at a time."""
    from ofmu_ray import tracking
    from ofmu_ray.config import TrackingConfig

    handle = tracking.start(TrackingConfig(), str(tmp_path), "many", {})
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert tracking.finish(handle, metrics={f"m{n}": {f"f{k}": value for k in range(200)} for n in range(6)})
    logged = sqlite3.connect(tmp_path / "mlflow.db").execute("select count(*) from latest_metrics").fetchone()
    assert logged == (6 * 200,)


def test_the_printed_configuration_is_the_same_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ofmu_ray.commandline.parse import parse
    from ofmu_ray.config.evaluate import EvaluateConfig

    for name in ("evaluate_people", "evaluate_tofu"):
        file = Path(cli.__file__).parent / "configs" / f"{name}.yaml"
        with pytest.raises(SystemExit) as left:
            cli.main(["evaluate", "--config", str(file), "--print_config"])
        assert left.value.code == 0
        (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
        first, second = (
            parse(EvaluateConfig, ["--config", str(path)], "x") for path in (file, tmp_path / "printed.yaml")
        )
        assert first == second
