"""Mistakes at the front door: one message, status 2, nothing started and nothing written; names and their locks."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import LoraConfig, ModelConfig, SweepConfig, UnlearnConfig, outcome_hash
from ofmu_ray.errors import StartError, StorageError, UserError
from ofmu_ray.models.loading import load_tokenizer
from ofmu_ray.models.stored_names import PLAIN, check_names, parameter_names
from ofmu_ray.runs.claims import Claim, locked
from ofmu_ray.runs.preflight import public
from ofmu_ray.runs.run import as_begun
from ofmu_ray.runs.this_run import Run
from ofmu_ray.search.run_sweep import space_of
from ofmu_ray.storage import explained
from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "twice.yaml": b"ofmu: {beta: 1}\ntraining: {rounds: 2}\nofmu: {rho: 2}\n",
    "inner_twice.yaml": b"training:\n  rounds: 2\n  rounds: 3\n",
    "list.yaml": b"[1, 2]\n",
    "section.yaml": b"training: [rounds, 3]\n",
    "text.yaml": b"training: fast\n",
    "nothing.yaml": b"seed: 2\ntraining:\n  # rounds: 3\n",
    "inner_nothing.yaml": b"ofmu:\n  inner:\n",
    "empty.yaml": b"",
    "comment.yaml": b"# nothing yet\n",
    "binary.yaml": b"\x89PNG\xff\xfe\x00",
    "broken.yaml": b"training:\n  rounds: 2: 3\n",
    "tag.yaml": b"seed: 1\ntraining: !mine {rounds: 3}\n",
    "list_key.yaml": b"? [a]\n: 3\n",
    "npo.yaml": b"npo: {beta: 0.2}\n",
}
MISTAKES = {
    "key twice": (["--config", "twice.yaml"], "'twice.yaml': ofmu is there twice, in lines 1 and 3"),
    "option twice": (["--config", "inner_twice.yaml"], "training.rounds is there twice, in lines 2 and 3"),
    "list as a file": (["--config", "list.yaml"], "'list.yaml': the file is a list"),
    "list as a section": (["--config=section.yaml"], "'section.yaml', line 1: training is a section"),
    "text as a section": (["--config", "text.yaml"], "training is a section"),
    "section without options": (["--config", "nothing.yaml"], "'nothing.yaml', line 2: training is a section"),
    "inner section without options": (
        ["--config", "inner_nothing.yaml"],
        "ofmu.inner is a section, so it must contain options by name (`ofmu.inner: {option: value}`), not nothing",
    ),
    "empty file": (["--config", "empty.yaml"], "'empty.yaml': the file has no options"),
    "only a comment": (["--config", "comment.yaml"], "'comment.yaml': the file has no options"),
    "binary file": (["--config", "binary.yaml"], "'binary.yaml': not a text file"),
    "missing file": (["--config", "mine.yaml"], "config = 'mine.yaml': cannot be read (No such file or directory)"),
    "broken YAML": (["--config", "broken.yaml"], "'broken.yaml', line 2: not YAML"),
    "tag in YAML": (["--config", "tag.yaml"], "'tag.yaml', line 2: not YAML (could not determine a constructor"),
    "list as a key": (["--config", "list_key.yaml"], "'list_key.yaml', line 1: not YAML (found unhashable key)"),
    "name outside the storage": (["--name", "../evil"], "name = '../evil': must be a folder's name"),
    "hidden name": (["--name", ".x"], "name = '.x': must be a folder's name"),
    "name of the cache": (["--name", "cache"], "name = 'cache': must be another"),
    "name of the database": (["--name", "mlflow.db-wal"], "must be another"),
    "long name": (["--name", "x" * 300], "at most 128 bytes"),
    "negative seed": (["--seed", "-3"], "seed = -3: must be from 0"),
    "option of another method": (["--npo.beta", "3"], "npo.beta: an option of the method npo, but method = ofmu"),
    "section of another method": (["--config", "npo.yaml"], "npo: an option of the method npo, but method = ofmu"),
    "option of another than the method": (
        ["--method", "npo", "--ofmu.beta", "1"],
        "ofmu.beta: an option of the method",
    ),
    "no GPU": (["--training.gpus_per_worker", "1"], "training.gpus_per_worker = 1 GPUs, but torch finds none"),
    "forget is retain": (["--data.retain.path", "builtin:people/forget.jsonl"], "data.forget and data.retain are the"),
    "freeze without a match": (["--model.freeze", "[layernom]"], "model.freeze: 'layernom' matches no parameter"),
    "layer too high": (["--method", "rmu", "--rmu.layer", "99"], "rmu.layer = 99: the model has layers 0 to 3"),
    "adapter without a module": (["--model.lora.target_modules", "[nope]"], "model.lora.target_modules = ['nope']"),
    "model on the hub": (["--model.path", "nobody/nothing"], "'nobody/nothing': no such folder here, and as a name"),
    "rows on the hub": (["--data.forget.path", "nobody/nothing"], "nobody/nothing: neither a file or folder here nor"),
    "target that is not trained": (
        ["--model.path", "runs/tofu_target/model"],
        "'runs/tofu_target/model': no such folder; run `ofmu train` first",
    ),
    "abbreviated option": (["--ofmu.inner_step", "3"], "--ofmu.inner_step. Did you mean ofmu.inner_steps?"),
    "abbreviated section": (["--train.rounds", "3"], "--train.rounds. Did you mean training.rounds?"),
    "one dash": (["-name", "x"], "unknown option -name. Did you mean name?"),
    "shipped configuration misspelt": (["--config", "tofu_forget5"], "Did you mean tofu_forget05?"),
    "help on nothing": (["--help", "ofmuu"], "--help ofmuu: no such section. Did you mean ofmu?"),
    "unknown method": (["--method", "npoo"], "method = npoo: no such choice. Did you mean npo?"),
    "unknown stage": (["--training.zero_stage", "4"], "training.zero_stage"),
    "text for a number": (["--training.rounds", "many"], "training.rounds = many: must be a whole number\n"),
    "text for a list": (["--model.freeze", "m"], "model.freeze = m: must be a list such as [a, b]"),
    "text for a switch": (["--evaluation.enabled", "maybe"], "evaluation.enabled = maybe: must be true or false"),
    "text for a number or a word": (
        ["--training.gpus_per_worker", "x"],
        "training.gpus_per_worker = x: must be a number or auto",
    ),
    "text for a rank": (["--model.lora.rank", "x"], "model.lora.rank = x: must be a whole number\n"),
    "text for modules": (
        ["--model.lora.target_modules", "q_proj"],
        "model.lora.target_modules = q_proj: must be a list such as [a, b] or null",
    ),
    "number for a section": (["--model.lora", "3"], "model.lora = 3: a section of options; give them one by one, such"),
    "path for a section": (["--data.forget", "x"], "data.forget = x: a section of options; give them one by one, such"),
    "path for models": (["evaluate", "--models", "x"], "models = x: must be options by name such as {a: b}"),
    "rows for an attack": (
        ["evaluate", "--checks.relearn", "{rows: x}"],
        "checks.relearn.rows = x: must be a whole number\n",
    ),
    "questions without a path": (["evaluate", "--checks.choice", "[{name: x}]"], "checks.choice: it lacks path"),
    "no rounds": (["--training.rounds", "0"], "training.rounds = 0: must be greater than 0"),
    "SGD without a rate": (["--ofmu.inner.name", "sgd"], "ofmu.inner.lr: give a learning rate"),
    "idle GPU": (["--training.gpus_per_worker=2"], "a worker computes on one GPU"),
    "shared GPU": (["--training.workers=2", "--training.gpus_per_worker=0.5"], "NCCL does not let workers share a GPU"),
    "seed too large": (["--seed", str(2**70)], "must be from 0 to 2^63 - 1"),
    "absolute name": (["--name", "/x"], "name = '/x': must be a folder's name"),
    "empty name": (["--name", ""], "name = '': must be a folder's name"),
    "adapter of no adapters": (
        ["--export.weights", "adapter"],
        "export.weights = adapter, but no adapters are trained",
    ),
    "size in words": (["--export.max_shard_size", "big"], "export.max_shard_size = 'big': must be a number and a unit"),
    "option of ofmu unlearn": (["train", "--method", "npo"], "unknown option --method"),
    "heads that do not divide": (["train", "--scratch.heads", "3"], "scratch.heads = 3: must be a divisor"),
    "no epochs": (["train", "--epochs", "0"], "epochs = 0"),
    "epochs without end": (["train", "--epochs", ".inf"], "epochs = inf: must be greater than 0 and finite"),
    "mean in bytes": (["train", "--classifier.mean", "[125.3]"], "classifier.mean = [125.3]: must be from 0 (black)"),
    "no deviation": (["train", "--classifier.std", "[0]"], "classifier.std = [0.0]: must be greater than 0"),
    "cluster of no set": (
        ["--evaluation.clusters", "{forgt: 20}"],
        "evaluation.clusters: no set 'forgt'. Did you mean forget? Sets: forget, retain, real_authors, world_facts, ho",
    ),
    "reserved label": (["evaluate", "--models", "{retrained: x}"], "models.retrained: give the retrained model as"),
    "label with a space": (["evaluate", "--models", "{a b: x}"], "models = 'a b': must be labelled with"),
    "model to evaluate": (["evaluate", "--models", "{a: ./nowhere}"], "models.a = './nowhere': no such folder"),
    "evaluation switched off": (["evaluate", "--evaluation.enabled", "false"], "this command only evaluates"),
    "run that is not there": (["show", "nothing"], "no such folder; give the --storage of your runs"),
    "report of no run": (["report", "nothing"], "no such folder; give the --storage of your runs"),
    "show without a name": (["show"], "required: name"),
    "log that is not there": (["metrics", "tofu", "--log", "nowhere.json"], "nowhere.json"),
    "format of logs": (["metrics", "muse", "--log", "x"], "invalid choice: 'muse'"),
    "schema of no command": (["schema", "unlern"], "invalid choice: 'unlern'"),
    "file of a plan": (
        ["plan", "--plan.row_tokens", "8", "--plan.json", "nowhere/plan.json"],
        "plan.json = 'nowhere/plan.json': cannot be written (No such file or directory)",
    ),
    "request's command": (["requests", "frobnicate"], "unknown command 'frobnicate'. Commands:"),
}
"""What is typed (after `unlearn`, if it names no command) -> a part of the message."""
WITHOUT_STORAGE = ("metrics", "schema", "requests")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_before_anything_starts(mistake, tmp_path, capsys, monkeypatch):
    words, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    words = words if words[0] in cli.COMMANDS else ["unlearn", *words]
    storage = [] if words[0] in WITHOUT_STORAGE else ["--storage", "runs"]
    assert cli.main([*words, *storage]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists() or not [path for path in Path("runs").iterdir() if path.name != "cache"]
    assert {path.name for path in tmp_path.iterdir()} <= {*FILES, "runs"}


BEFORE_TORCH = ("freeze without a match", "layer too high", "adapter without a module")
BEFORE_TORCH += ("target that is not trained", "model on the hub")


@pytest.mark.system
@pytest.mark.parametrize("mistake", BEFORE_TORCH)
def test_a_mistake_costs_less_than_three_seconds(mistake, tmp_path):
    """CPU seconds of the whole command, which do not depend on what else the machine does."""
    words, message = MISTAKES[mistake]
    command = [sys.executable, "-m", "pipelines.cli", "unlearn", *words, "--storage", str(tmp_path / "runs")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_a_dead_ray_address(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert cli.main(["unlearn", "--storage", str(tmp_path)]) == 2
    assert "RAY_ADDRESS = '127.0.0.1:9': no Ray head answers there" in capsys.readouterr().err


def test_a_ray_that_does_not_start_is_one_message(monkeypatch):
    from ofmu_ray.cluster import connect

    def busy(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connect.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connect.ray, "init", busy)
    with pytest.raises(StartError, match="Ray did not start on this machine in time") as caught:
        connect.connect(1)
    assert caught.value.status == 1


@pytest.mark.parametrize("command", ["train", "evaluate", "sweep", "benchmark"])
def test_other_commands_refuse_a_name_outside_too(command, tmp_path, capsys):
    splits = {"benchmark": ["--splits", "{people: {}}"], "evaluate": ["--models", "{a: builtin:people/target}"]}
    words = [command, "--name", "../evil", "--storage", str(tmp_path / "runs"), *splits.get(command, [])]
    assert cli.main(words) == 2
    assert "name = '../evil'" in capsys.readouterr().err


def test_one_file_may_serve_several_methods(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("ofmu: {beta: 1}\nnpo: {beta: 0.2}\n")
    assert parse(UnlearnConfig, ["--config", str(path), "--method", "npo"], "x").npo.beta == 0.2


def test_a_runs_configuration_is_the_base_of_a_sweep(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("name: mine\nstorage: there\nmethod: npo\nnpo: {optimizer: {lr: 3e-5}}\ntraining: {rounds: 7}\n")
    config = parse(SweepConfig, ["--config", str(path), "--search.trials", "3"], "x")
    assert (config.name, config.storage, config.label, config.search.trials) == ("sweep", "there", "npo", 3)
    assert (config.base.training.rounds, config.base.npo.optimizer.lr) == (7, 3e-5)
    quick = ROOT / "pipelines/configs/quickstart.yaml"
    run = parse(UnlearnConfig, ["--config", str(quick)], "x")
    assert parse(SweepConfig, ["--config", str(quick)], "x").base.ofmu == run.ofmu
    path.write_text("training: {rounds: 7}\nofmu: {preset: lite}\n")
    assert parse(SweepConfig, ["--config", str(path)], "x").label == "ofmu_lite"
    path.write_text("label: npo\ntraining: {rounds: 7}\n")
    with pytest.raises(UserError, match="training"):
        parse(SweepConfig, ["--config", str(path)], "x")


def test_a_sweep_tunes_what_the_readmes_file_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    path = tmp_path / "my.yaml"
    path.write_text(re.search(r"```yaml\n(# my\.yaml\n.*?)```", text, re.DOTALL)[1])
    run = parse(UnlearnConfig, ["--config", str(path)], "x")
    config = parse(SweepConfig, ["--config", str(path)], "x")
    assert config.label == SweepConfig().label == "ofmu"
    assert config.run == run
    assert (config.run.evaluation.retrained, config.run.evaluation.sets.forget) == (None, None)
    fields = [knob.field for knob in space_of(config).knobs]
    assert fields == ["ofmu.inner.lr", "ofmu.outer_ratio"]


# -------------------------------------------------------------------------------------------------- names and locks


def claim(storage: Path, **options) -> Claim:
    config = UnlearnConfig(name="r", storage=str(storage), **options)
    return Claim(str(storage / "r"), "unlearn", outcome_hash(config), public(config), config.overwrite)


def failing(name: Claim, error: BaseException, leaves: str) -> None:
    """A run that fails with a folder written."""
    with name.held():
        Path(name.home, leaves).mkdir(parents=True)
        raise error


def test_a_failed_check_gives_the_name_back(tmp_path):
    with pytest.raises(UserError, match="overlap"):
        failing(claim(tmp_path), UserError("overlap"), leaves="tokens")
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()
    (tmp_path / "r/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="overlap"):
        failing(claim(tmp_path), UserError("overlap"), leaves="tokens")
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["thesis.tex"]
    assert claim(tmp_path, seed=1).check()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("full"), UserError("late")])
def test_a_run_with_a_checkpoint_and_an_interrupted_one_keep_their_name(error, tmp_path):
    with pytest.raises(type(error)):
        failing(claim(tmp_path), error, leaves="train/000002_x" if type(error) is UserError else "tokens")
    assert claim(tmp_path).check()
    with pytest.raises(UserError, match="another configuration"):
        claim(tmp_path, seed=1).check()


def test_a_taken_name_says_which_options_differ_and_can_be_overwritten(tmp_path):
    with claim(tmp_path).held():
        (tmp_path / "r/model").mkdir()
        (tmp_path / "r/model/old").write_text("")
    other = {"seed": 3, "method": "npo"}
    with pytest.raises(UserError, match=r"seed = 0, now 3; method = ofmu, now npo; .* --overwrite to delete that run"):
        claim(tmp_path, **other).check()
    with pytest.raises(UserError, match="seed = 0"), claim(tmp_path, **other).held():
        pass
    assert (tmp_path / "r/model/old").exists()
    new = claim(tmp_path, overwrite=True, **other)
    assert not new.check()
    with new.held():
        assert not (tmp_path / "r/model").exists()
    assert claim(tmp_path, **other).check()
    assert "overwrite" not in json.loads((tmp_path / "r/run.json").read_text())["options"]
    with pytest.raises(UserError, match="an `ofmu unlearn` has this name"):
        Claim(str(tmp_path / "r"), "train", "x", {}, overwrite=True).check()


def test_a_run_that_began_before_an_option_goes_on_as_it_was(tmp_path):
    fresh = UnlearnConfig(name="r", storage=str(tmp_path), method="npo")
    assert not fresh.training.decay_norms
    earlier = dataclasses.replace(fresh, training=dataclasses.replace(fresh.training, decay_norms=True))
    run = Run(fresh, str(tmp_path), outcome_hash(fresh))
    assert as_begun(run) is run
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run.json").write_text(json.dumps({"config_hash": outcome_hash(earlier), "command": "unlearn"}))
    assert as_begun(run).config == earlier
    assert as_begun(run).claim.check()


def test_overwrite_is_a_flag_and_no_part_of_the_outcome():
    config = parse(UnlearnConfig, ["--overwrite", "--seed", "2"], "x")
    assert config.overwrite
    assert parse(UnlearnConfig, ["--seed", "2", "--overwrite"], "x") == config
    assert outcome_hash(config) == outcome_hash(UnlearnConfig(seed=2))


def test_an_evaluation_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/metrics.json").write_text("{}")
    with pytest.raises(UserError, match="an evaluation or a benchmark has this name"):
        claim(tmp_path).check()


def test_two_at_once(tmp_path):
    with claim(tmp_path).held():
        with pytest.raises(UserError, match=r"process \d+ on .* is running it now"):
            claim(tmp_path).check()
        with pytest.raises(UserError, match="is running it now"), locked(tmp_path / "r"):
            pass
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["run.json"]
    assert claim(tmp_path).check()


def test_a_full_disk_under_mlflows_database_is_a_storage_error(tmp_path):
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("create table t (x)")
    database.execute("pragma max_page_count = 2")

    def insert() -> None:
        try:
            database.execute("insert into t values (zeroblob(100000))")
        except sqlite3.Error as error:  # as SQLAlchemy and MLflow wrap it
            raise ValueError("(sqlite3.OperationalError) [SQL: INSERT ...]") from error

    with pytest.raises(StorageError, match="no space left") as caught, explained(tmp_path):
        insert()
    assert caught.value.status == 1
    assert "SQL" not in str(caught.value)


@pytest.mark.parametrize("command", ["sweep", "benchmark"])
def test_a_full_disk_under_a_search_is_one_message(command, tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "trials"))

    monkeypatch.setattr(f"ofmu_ray.search.run_{command}.checked", full)
    splits = ["--splits", "{people: {}}"] if command == "benchmark" else []
    assert cli.main([command, "--storage", str(tmp_path), *splits]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ofmu {command}: error: {tmp_path}/trials: no space left: free some space")
    assert error.count("\n") == 1


def _heeding_interrupts() -> None:
    """A shell's background jobs, and so perhaps these tests, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.system
def test_ctrl_c_is_one_line_and_the_same_command_resumes(tmp_path):
    words = ["unlearn", "--name", "r", "--storage", str(tmp_path), "--training.rounds", "200"]
    words += ["--training.checkpoint_every", "1", "--evaluation.enabled", "false", "--stop.forgotten", "null"]
    command = [sys.executable, "-m", "pipelines.cli", *words]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=_heeding_interrupts)
        while not list(tmp_path.glob("r/train/0*")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"process {process.pid} on" in second.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1] == "ofmu unlearn: interrupted; the same command resumes"
    assert "Traceback" not in "\n".join(lines)
    assert not (tmp_path / "r/.lock").exists()
    assert yaml.safe_load((tmp_path / "r/run.json").read_text())["command"] == "unlearn"


# ------------------------------------------------------------------------------------------------------ kinds of models


def tiny(folder: Path, config, kind) -> str:
    kind(config).save_pretrained(folder)
    for path in (ROOT / "ofmu_ray/assets/people/target").glob("tokenizer*"):
        shutil.copy(path, folder)
    return str(folder)


SHAPE = {"vocab_size": 4096, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
OTHERS = {
    "BertForMaskedLM": ("Bert", SHAPE),
    "BertLMHeadModel": ("Bert", SHAPE),  # an encoder that attends to both sides
    "T5ForConditionalGeneration": ("T5", {"vocab_size": 4096, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}),
    "LlamaForSequenceClassification": ("Llama", SHAPE),
    "LlamaModel": ("Llama", SHAPE),
}


@pytest.mark.parametrize("name", OTHERS)
def test_only_causal_language_models_are_taken(name, tmp_path, capsys):
    import transformers

    family, shape = OTHERS[name]
    config = getattr(transformers, f"{family}Config")(**shape)
    path = tiny(tmp_path / "m", config, getattr(transformers, name))
    assert cli.main(["unlearn", "--model.path", path, "--storage", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert f"{name} is not a causal language model" in error
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Gemma2", "Bloom", "Mamba", "Llama"])
def test_attention_falls_back_to_eager(family, tmp_path):
    import transformers

    from ofmu_ray import progress
    from ofmu_ray.config import ModelConfig
    from ofmu_ray.models.loading import load_causal_lm
    from ofmu_ray.tasks.causal_lm import TASK

    shape = SHAPE | {"Bloom": {"n_layer": 1, "n_head": 2}, "Mamba": {"state_size": 4}}.get(family, {})
    config = getattr(transformers, f"{family}Config")(**shape)
    path = tiny(tmp_path / "m", config, getattr(transformers, f"{family}ForCausalLM"))
    notes = []

    class Notes(progress.Listener):
        def note(self, topic, text):
            notes.append(text)

    with progress.listening(Notes()):
        TASK.skeleton(ModelConfig(path=path))
    module, _ = load_causal_lm(ModelConfig(path=path))
    kernel = module.config._attn_implementation
    assert (kernel, notes) == (
        ("sdpa", []) if family == "Llama" else ("eager", [f"{family} has no sdpa attention; eager is used instead"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_files_have_the_names_of_the_parameters(tied, tmp_path):
    """Those that `model.freeze` and adapters are checked against before torch is imported."""
    import transformers
    from families import FAMILIES, family_config

    kinds = {config.model_type: config for config in map(family_config, FAMILIES)}
    assert kinds.keys() >= PLAIN
    for kind in sorted(PLAIN):
        kinds[kind].tie_word_embeddings = tied
        module = transformers.AutoModelForCausalLM.from_config(kinds[kind])
        module.save_pretrained(tmp_path / kind)
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        assert sorted(parameter_names(str(tmp_path / kind))) == sorted(names)
    kinds["gpt2"].save_pretrained(tmp_path / "gpt2")
    assert parameter_names(str(tmp_path / "gpt2")) is None


@pytest.mark.parametrize("lora", [None, ["q_proj"], ["layers.0.mlp"], ["lm_head"]])
def test_names_that_the_files_have_pass(lora):
    expressions = ["lm_head", r"^model\.embed_tokens\.weight$", r"layers\.3\."]
    adapter = None if lora is None else LoraConfig(target_modules=lora)
    model = ModelConfig(path="builtin:people/target", freeze=expressions, lora=adapter)
    check_names(model, {"rmu.layer": 3})
    with pytest.raises(UserError, match=r"lunar\.layer = 4: the model has layers 0 to 3"):
        check_names(model, {"lunar.layer": 4})


# ------------------------------------------------------------------------------------------- rows that do not fit


def gpt2(folder: Path, **sizes: int) -> str:
    """A tiny model with the tokenizer of the built-in ones."""
    import transformers

    tokenizer = load_tokenizer(ModelConfig(path="builtin:people/target"))
    sizes = {"vocab_size": len(tokenizer), "n_embd": 8, "n_layer": 1, "n_head": 1} | sizes
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


UNFIT = {
    "rows": ({"n_positions": 32}, [], "data.forget: its longest row has 38 tokens, but {path} has 32 positions"),
    "tokens": ({"vocab_size": 300}, [], "{path} knows 300 tokens: name the model's own with --model.tokenizer"),
    "tokens to evaluate": (
        {"vocab_size": 300},
        ["--evaluation.enabled", "true"],
        "model.path = '{path}': it knows 300 tokens, but the rows of forget have token number 1",
    ),
    "a paraphrase": (
        {"n_positions": 64},
        ["--evaluation.enabled", "true", "--evaluation.sets.forget", "forget.jsonl"],
        "model.path = '{path}': it has 64 positions, but the longest text of forget has 1",
    ),
    "the retrained model's tokens": (
        {"vocab_size": 300},
        ["--model.path", "builtin:people/target", "--evaluation.enabled", "true", "--evaluation.retrained", "{path}"],
        "evaluation.retrained = '{path}': it knows 300 tokens",
    ),
}
"""Sizes of the model, options, message."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """One for several tests, as MLflow's database takes long to make."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("case", UNFIT)
def test_rows_that_a_model_has_no_place_for(case, tmp_path, storage, capsys, monkeypatch):
    sizes, options, message = UNFIT[case]
    monkeypatch.chdir(tmp_path)
    path = gpt2(tmp_path / "gpt2", **sizes)
    row = {"question": "Who?", "answer": "I.", "paraphrased_answer": "No " * 80, "perturbed_answer": ["You."]}
    Path("forget.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--model.path", path, "--evaluation.enabled", "false", "--evaluation.retrained", "null"]
    words += [option.format(path=path) for option in options]
    assert cli.main(["unlearn", *words, "--storage", str(storage), "--name", "r"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ofmu unlearn: error:")
    assert message.format(path=path) in last
    assert not (storage / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"n_positions": 24}, {"vocab_size": 300}], ids=["positions", "tokens"])
def test_evaluated_rows_that_a_model_has_no_place_for(sizes, tmp_path, capsys):
    path = gpt2(tmp_path / "gpt2", **sizes)
    assert cli.main(["evaluate", "--models", f"{{a: {path}}}", "--storage", str(tmp_path / "runs")]) == 2
    size = "24 positions, but the longest text of" if "n_positions" in sizes else "knows 300 tokens, but the rows of"
    assert f"models.a = {path!r}: it {'has ' * ('n_positions' in sizes)}{size} forget" in capsys.readouterr().err


def test_old_rows_tell_their_largest_token(tmp_path):
    """Nothing but the files' footers is read, so rows that an earlier version prepared tell it, too."""
    from ofmu_ray.data.prepare import TokenisedStream, largest_tokens

    parts = {"a.parquet": [[1, 7], [3]], "b.parquet": [[2]], "none.parquet": []}
    for name, rows in parts.items():
        ids = pa.array(rows, pa.list_(pa.int32()))
        pq.write_table(pa.table({"input_ids": ids, "length": [900] * len(rows)}), tmp_path / name)
    stored = tuple((name, len(rows)) for name, rows in parts.items())
    texts = TokenisedStream("forget", str(tmp_path), stored, np.arange(3), np.ones(3), "")
    pq.write_table(pa.table({"label": [1000]}), tmp_path / "images.parquet")
    images = dataclasses.replace(texts, parts=(("images.parquet", 1),))
    assert largest_tokens({"forget": texts, "retain": images}) == {"forget": 7}


@pytest.mark.parametrize("option", ["model.path", "data.forget.path"])
def test_a_hub_that_does_not_answer_is_one_line(option, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens at the port `discard`
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    words = ["--evaluation.enabled", "false", "--storage", str(tmp_path / "runs"), "--name", "r"]
    assert cli.main(["unlearn", f"--{option}", "nobody/nothing", *words]) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith(f"ofmu unlearn: error: {option} = ")
    assert "nobody/nothing" in last
    assert "the hub is not reachable" in last
    assert "and it is not in the cache" in last
    assert sum("error" in line for line in error.splitlines()) == 1, error
    assert not (tmp_path / "runs/r").exists()
