"""Names and their locks, interruptions and full disks, and models that are refused."""

import dataclasses
import errno
import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from interrupts import heed_ctrl_c
from mistakes import one_message, refused

from ofmu_ray import progress
from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import LoraConfig, ModelConfig, SweepConfig, UnlearnConfig, outcome_hash
from ofmu_ray.config.optimizers import scale_for
from ofmu_ray.errors import StartError, StorageError, UserError
from ofmu_ray.models.loading import load_tokenizer
from ofmu_ray.models.stored_names import PLAIN, check_names, parameter_names
from ofmu_ray.runs.claims import Claim, locked
from ofmu_ray.runs.preflight import public
from ofmu_ray.runs.run import as_begun
from ofmu_ray.runs.this_run import Run
from ofmu_ray.search.run_sweep import _lr_scale, space_of
from ofmu_ray.storage import explained
from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent


def test_a_dead_ray_address(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    message = "RAY_ADDRESS = '127.0.0.1:9': no Ray head answers there"
    refused(["unlearn", "--storage", str(tmp_path)], message, capsys=capsys)


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
    refused(words, "name = '../evil'", capsys=capsys)


def test_one_file_may_serve_several_methods(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("ofmu: {beta: 1}\nnpo: {beta: 0.2}\n")
    assert parse(UnlearnConfig, ["--config", str(path), "--method", "npo"], "x").npo.beta == 0.2


@pytest.mark.slow
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
    rule = config.select.resolved(config.run.evaluation)
    assert (rule.objective, rule.utility) == ("forget_probability", "retain_probability"), "what its rows can give"
    builtin = SweepConfig()
    rule = builtin.select.resolved(builtin.run.evaluation)
    assert (rule.objective, rule.utility) == ("forget_quality", "model_utility")
    shorter = dataclasses.replace(rule, utility="auto", max_new_tokens=0).resolved(builtin.run.evaluation)
    assert (shorter.objective, shorter.utility) == ("forget_quality", "retain_probability")
    fields = [knob.field for knob in space_of(config).knobs]
    assert fields == ["ofmu.inner.lr", "ofmu.outer_ratio"]


def test_a_sweeps_rates_follow_from_the_size(monkeypatch):
    notes = []
    monkeypatch.setattr(progress, "note", lambda *words: notes.append(words))
    assert scale_for(1e9) == 1.0
    assert SweepConfig().lr_scale is None
    scale = _lr_scale(UnlearnConfig())
    assert scale == pytest.approx((1e9 / 541_536) ** 0.5, rel=0.01)
    assert notes == [("rates", "43 times those for 1 B parameters (lr_scale), for 541,536 trained parameters")]
    with_adapters = UnlearnConfig(model=ModelConfig(lora=LoraConfig(rank=2)))
    assert _lr_scale(with_adapters) > 3 * scale
    rate = space_of(SweepConfig(lr_scale=scale)).knobs[0]
    assert rate.prior.low == pytest.approx(scale * space_of(SweepConfig()).knobs[0].prior.low)


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


@pytest.mark.system
@pytest.mark.parametrize("engine", ["torch", pytest.param("deepspeed", marks=pytest.mark.full)])
def test_ctrl_c_is_one_line_and_the_same_command_resumes(engine, tmp_path):
    words = ["unlearn", "--name", "r", "--storage", str(tmp_path), "--training.rounds", "200"]
    words += ["--training.engine", engine]  # deepspeed: under Ray Train, which has its own way with Ctrl-C
    words += ["--training.checkpoint_every", "1", "--evaluation.enabled", "false", "--stop.forgotten", "null"]
    command = [sys.executable, "-m", "pipelines.cli", *words]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=heed_ctrl_c)
        while not list(tmp_path.glob("r/train/*0*")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    one_message(second.returncode, second.stdout, second.stderr, f"process {process.pid} on")
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
    words = ["unlearn", "--model.path", path, "--storage", str(tmp_path / "runs")]
    refused(words, f"{name} is not a causal language model", capsys=capsys)
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
    kinds["gemma"] = transformers.GemmaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, head_dim=8
    )
    assert kinds.keys() >= PLAIN.keys()
    for kind in PLAIN:
        kinds[kind].tie_word_embeddings = tied
        module = transformers.AutoModelForCausalLM.from_config(kinds[kind])
        module.save_pretrained(tmp_path / kind)
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        assert sorted(parameter_names(str(tmp_path / kind))) == sorted(names)
    kinds["mixtral"].save_pretrained(tmp_path / "mixtral")
    assert parameter_names(str(tmp_path / "mixtral")) is None


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
    words = ["unlearn", *words, "--storage", str(storage), "--name", "r"]
    refused(words, message.format(path=path), capsys=capsys, notes=True)
    assert not (storage / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"n_positions": 24}, {"vocab_size": 300}], ids=["positions", "tokens"])
def test_evaluated_rows_that_a_model_has_no_place_for(sizes, tmp_path, capsys):
    path = gpt2(tmp_path / "gpt2", **sizes)
    size = "24 positions, but the longest text of" if "n_positions" in sizes else "knows 300 tokens, but the rows of"
    message = f"models.a = {path!r}: it {'has ' * ('n_positions' in sizes)}{size} forget"
    words = ["evaluate", "--models", f"{{a: {path}}}", "--storage", str(tmp_path / "runs")]
    refused(words, message, capsys=capsys, notes=True)


def test_old_rows_tell_their_largest_token(tmp_path):
    """Nothing but the files' footers is read, so rows that an earlier version prepared tell it, too."""
    from ofmu_ray.data.prepare import largest_tokens
    from ofmu_ray.data.stored_stream import TokenisedStream

    parts = {"a.parquet": [[1, 7], [3]], "b.parquet": [[2]], "none.parquet": []}
    for name, rows in parts.items():
        ids = pa.array(rows, pa.list_(pa.int32()))
        pq.write_table(pa.table({"input_ids": ids, "length": [900] * len(rows)}), tmp_path / name)
    stored = tuple((name, len(rows)) for name, rows in parts.items())
    texts = TokenisedStream("forget", str(tmp_path), stored, np.empty(0), 4, 2, "")
    pq.write_table(pa.table({"label": [1000]}), tmp_path / "images.parquet")
    images = dataclasses.replace(texts, parts=(("images.parquet", 1),))
    assert largest_tokens({"forget": texts, "retain": images}) == {"forget": 7}


def _hub(monkeypatch, endpoint):
    """A hub that is asked without a proxy."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_a_name_that_is_never_looked_up_is_not_waited_for(tmp_path, capsys, monkeypatch):
    """A dead name server: the system looks names up for half a minute, whatever the limit of the connection."""
    _hub(monkeypatch, "http://hub.example")
    over = threading.Event()

    def never(*_, **__):
        over.wait(30)
        raise socket.gaierror("the name server answered at last")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    parts = ("the hub is not reachable (no answer within 1.5 seconds)", "not in the cache")
    refused(["unlearn", "--model.path", "nobody/nothing", "--storage", str(tmp_path)], *parts, capsys=capsys)
    over.set()


@pytest.mark.parametrize("option", ["model.path", "data.forget.path"])
def test_a_hub_that_does_not_answer_is_one_line(option, tmp_path, capsys, monkeypatch):
    _hub(monkeypatch, "http://127.0.0.1:9")  # nothing listens at the port `discard`
    words = ["--evaluation.enabled", "false", "--storage", str(tmp_path / "runs"), "--name", "r"]
    parts = (f"ofmu unlearn: error: {option} = ", "nobody/nothing", "the hub is not reachable", "not in the cache")
    refused(["unlearn", f"--{option}", "nobody/nothing", *words], *parts, capsys=capsys, notes=True)
    assert not (tmp_path / "runs/r").exists()
