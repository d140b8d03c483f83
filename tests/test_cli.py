"""The command line: options, files of them, hashes of configurations, exit statuses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mistakes import refused

from ofmu_ray import train, unlearn
from ofmu_ray.commandline.parse import configured, parse
from ofmu_ray.config import (
    BenchmarkConfig,
    SweepConfig,
    TrainConfig,
    TrainingConfig,
    UnlearnConfig,
    apply_overrides,
    config_hash,
    outcome_hash,
    to_dict,
)
from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.errors import UserError
from ofmu_ray.methods.ofmu import OFMUConfig
from ofmu_ray.methods.registry import discovered
from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "ofmu_ray/assets/people/target"


@pytest.mark.system
def test_import_costs_neither_torch_nor_ray():
    code = (
        "import sys, time; t = time.perf_counter(); import ofmu_ray, ofmu_ray.config; s = time.perf_counter() - t; "
        "print(sorted(m for m in ('torch', 'ray', 'deepspeed', 'mlflow', 'transformers') if m in sys.modules), s)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.startswith("[] ")


@pytest.mark.slow
def test_print_config_can_be_fed_back(tmp_path, capsys):
    words = ["unlearn", "--ofmu.preset", "full", "--ofmu.beta", "0.7", "--model.lora.rank", "4", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    expected = parse(UnlearnConfig, words[1:-1], "x")
    assert parse(UnlearnConfig, ["--config", str(path)], "x") == expected
    assert expected.ofmu == OFMUConfig.from_preset("full", beta=0.7)
    assert yaml.safe_load(text)["ofmu"]["penalty_curvature"] == "full"


@pytest.mark.slow
def test_a_python_user_gives_options_as_a_command_line_does(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("training: {rounds: 3}\nofmu: {preset: full, beta: 1e-5}\n")
    expected = parse(UnlearnConfig, ["--training.rounds", "3", "--ofmu.preset", "full", "--ofmu.beta", "1e-5"], "x")
    mapping = {"training": {"rounds": 3}, "ofmu": {"preset": "full", "beta": 1e-5}}
    assert [configured(UnlearnConfig, given) for given in (mapping, path, str(path), expected)] == [expected] * 4
    assert configured(UnlearnConfig, {"storage": tmp_path}).storage == str(tmp_path)
    assert configured(UnlearnConfig, "smollm2_forget05").name == "smollm2_forget05"


@pytest.mark.parametrize(
    ("entry", "given", "message"),
    [
        (unlearn, {"training": {"rouns": 3}}, "training.rouns in the configuration. Did you mean training.rounds?"),
        (unlearn, {"seed": "x"}, "seed = x: must be a whole number"),
        (unlearn, {"npo": {"beta": 1.0}}, "method = ofmu: add --method npo"),
        (unlearn, "/none.yaml", "config = '/none.yaml': cannot be read"),
        (train, {"training": 3}, "training is a section"),
        (train, UnlearnConfig(), "config is of type UnlearnConfig: give a TrainConfig, a mapping"),
    ],
)
def test_a_python_user_s_mistakes_read_as_on_a_command_line(entry, given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        entry(given)


def test_library_names():
    """What others import (docs/api.md)."""
    from ofmu_ray import methods
    from ofmu_ray.algorithm import similarity_gradient
    from ofmu_ray.engines import TorchEngine
    from ofmu_ray.methods import OFMU

    assert methods.OFMU is OFMU is discovered()["ofmu"]
    assert callable(OFMU(OFMUConfig()).round)
    assert callable(similarity_gradient)
    assert callable(TorchEngine)
    with pytest.raises(AttributeError, match="no attribute 'OFMUU'"):
        _ = methods.OFMUU


def test_presets_yield_to_explicit_options(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("ofmu: {preset: full, decorrelate_every: 3}\n")
    config = parse(UnlearnConfig, ["--config", str(path), "--ofmu.difference", "central"], "x").ofmu
    assert (config.penalty_curvature, config.decorrelate_every, config.difference) == ("full", 3, "central")
    assert not config.reuse_retain_gradient


@pytest.mark.slow
def test_shipped_configurations_go_by_name(tmp_path, monkeypatch, capsys):
    expected = parse(UnlearnConfig, ["--config", str(ROOT / "pipelines/configs/quickstart.yaml")], "x")
    monkeypatch.chdir(tmp_path)
    assert parse(UnlearnConfig, ["--config", "quickstart"], "x") == expected
    assert parse(UnlearnConfig, ["--config=quickstart", "--seed", "3"], "x").seed == 3
    with pytest.raises(UserError, match=r"config = 'quikstart': neither .* Did you mean quickstart\?"):
        parse(UnlearnConfig, ["--config", "quikstart"], "x")
    (tmp_path / "quickstart").write_text("seed: 7\n")
    assert parse(UnlearnConfig, ["--config", "quickstart"], "x").seed == 7, "a file of this name comes first"
    with pytest.raises(SystemExit):
        cli.main(["quickstart", "--seed", "3", "--print_config"])
    assert "name: null" in capsys.readouterr().out, "quickstart is the file here, too"


def test_hash_ignores_where_a_run_is_stored_and_nothing_else():
    base = UnlearnConfig()
    assert config_hash(base) == config_hash(UnlearnConfig(name="other", storage="elsewhere"))
    assert config_hash(base) != config_hash(UnlearnConfig(seed=1))
    assert config_hash(base) != config_hash(base, "other data")
    two_workers = UnlearnConfig(training=TrainingConfig(workers=2, micro_batch_size=1))
    assert outcome_hash(base) == outcome_hash(two_workers)
    assert config_hash(base) != config_hash(two_workers)
    assert outcome_hash(base) != outcome_hash(UnlearnConfig(training=TrainingConfig(batch_size=4)))


def test_an_option_that_came_later_leaves_hashes_as_they_were():
    decaying = TrainingConfig(decay_norms=True)
    rates = {f"{name}.lr": 1e-5 for name in ("ofmu.inner", "ofmu.outer", "npo.optimizer")}  # the defaults at that time
    plain = apply_overrides(UnlearnConfig(), rates | {"ofmu.forget_loss": "bounded_token"})
    assert outcome_hash(plain) == outcome_hash(replace(plain, training=decaying)) == "81207cfedf6124a1"
    npo = replace(plain, method="npo")
    assert outcome_hash(replace(npo, training=decaying)) == "954d89c342c93a40", "as before the option"
    assert outcome_hash(npo) != "954d89c342c93a40"
    assert config_hash(EvaluateConfig()) == "53632136bbb6443d"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "pipelines/configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_parse(path):
    commands = {"evaluate": EvaluateConfig, "benchmark": BenchmarkConfig, "sweep": SweepConfig}
    commands["requests"] = RequestsConfig
    usual = TrainConfig if "finetune" in yaml.safe_load(path.read_text()) else UnlearnConfig
    kind = commands.get(path.stem.partition("_")[0], usual)
    assert to_dict(parse(kind, ["--config", str(path)], "x"))


def test_keys_of_yaml_are_what_is_written(tmp_path):
    """YAML 1.1 reads `on` as true; docs/evaluation.md shows it."""
    path = tmp_path / "e.yaml"
    path.write_text("models: {1: a, no: b}\nchecks:\n  relearn: {on: retain, rows: 5, lr: 1e-3}\nname: 'on'\n")
    config = parse(EvaluateConfig, ["--config", str(path)], "x")
    assert (config.checks.relearn.on, config.checks.relearn.rows, config.checks.relearn.lr) == ("retain", 5, 1e-3)
    assert (config.models, config.name) == ({"1": "a", "no": "b"}, "on")
    assert parse(EvaluateConfig, ["--checks.relearn", "{on: retain}"], "x").checks.relearn.on == "retain"


@pytest.mark.system
@pytest.mark.parametrize("words", [["--help"], ["unlearn", "--help"], ["unlearn", "--help", "all"]])
def test_a_pipe_that_nobody_reads_any_more(words):
    command = [sys.executable, "-m", "pipelines.cli", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, b"")


def test_a_connection_that_breaks_is_no_reader_that_left(monkeypatch, tmp_path):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_called", broken)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            cli.main([])


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["unlearn"]) == 130
    assert capsys.readouterr().err == "\nofmu: interrupted\n"


def test_storage_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(["unlearn", "--storage", str(tmp_path / "file" / "runs")], "not writable", capsys=capsys)


def test_models_that_do_not_load(tmp_path, capsys):
    broken = shutil.copytree(TARGET, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a model")
    words = ["unlearn", "--storage", str(tmp_path), "--model.path", str(broken)]
    refused(words, "not a readable safetensors file", capsys=capsys)
    (broken / "model.safetensors").unlink()
    refused(words, "no *.safetensors", capsys=capsys)


def test_tokenizer_without_eos(tmp_path, capsys):
    folder = shutil.copytree(TARGET, tmp_path / "no_eos")
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if path.exists():
            content = json.loads(path.read_text())
            content.pop("eos_token", None)
            path.write_text(json.dumps(content))
    words = ["unlearn", "--storage", str(tmp_path), "--model.path", str(folder)]
    refused(words, "no end-of-sequence token", capsys=capsys)


def test_metrics_command_equals_the_golden_numbers(shared_dir, capsys):
    logs = shared_dir / "golden/tofu_eval_logs"
    words = ["metrics", "tofu", "--log", str(logs / "llama2-7b_full.json")]
    assert cli.main([*words, "--retrained-log", str(logs / "llama2-7b_retain90.json")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    expected = json.loads((shared_dir / "golden/tofu_expected.json").read_text())["full_vs_retain90"]
    names = {"Forget Quality": "forget_quality", "KS statistic": "ks_statistic", "Model Utility": "model_utility"}
    for theirs, value in expected.items():
        kind, _, part = theirs.replace("Truth Ratio", "TruthRatio").partition(" ")
        section = part.lower().replace("real world", "world_facts").replace(" ", "_")
        quantity = {"ROUGE": "rouge", "Prob.": "probability", "TruthRatio": "truth_ratio"}.get(kind)
        ours = names.get(theirs) or f"{section}_{quantity}"
        assert metrics[ours] == pytest.approx(value, abs=1e-6), ours
    refused(["metrics", "tofu", "--log", str(ROOT / "pyproject.toml")], capsys=capsys)
    refused(["metrics", "tofu"], capsys=capsys)


def test_configurations_refuse_what_cannot_run_together():
    with pytest.raises(UserError, match="attention"):
        parse(UnlearnConfig, ["--ofmu.curvature", "exact", "--training.engine", "torch"], "x")
    with pytest.raises(UserError, match=r"data\.split: it would replace the requested rows"):
        parse(RequestsConfig, ["--data.split.share", "0.1"], "x")


def test_what_is_written_down_holds_no_credentials():
    from ofmu_ray.runs.preflight import public

    words = ["--tracking.uri", "http://me:secret@host:5000", "--data.forget.path", "s3://key:secret@b/f.jsonl?secret=1"]
    written = public(parse(UnlearnConfig, words, "x"))
    assert "secret" not in json.dumps(written)
    assert written["tracking"]["uri"] == "http://host:5000"
    assert written["data"]["forget"]["path"] == "s3://b/f.jsonl"
