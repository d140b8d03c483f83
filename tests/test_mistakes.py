"""Mistakes at the front door, command by command: one message, status 2, nothing started and nothing written.

Here is what one command line and small files show. What takes a model, a run or a server to get wrong is tested beside
what it belongs to, by `mistakes.refused`, too.
"""

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mistakes import one_message, refused

ROOT = Path(__file__).resolve().parent.parent
TARGET = "builtin:people/target"
FILES = {
    "twice.yaml": b"ofmu: {beta: 1}\ntraining: {rounds: 2}\nofmu: {rho: 2}\n",
    "inner_twice.yaml": b"training:\n  rounds: 2\n  rounds: 3\n",
    "list.yaml": b"[1, 2]\n",
    "section.yaml": b"training: [rounds, 3]\n",
    "misspelt_section.yaml": b"trainig: {rounds: 3}\n",
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
    "attack.yaml": b"checks: {relern: {}}\n",
    "runtime_env.yaml": b"env_vars: {}\n",
    "bert/config.json": b'{"model_type": "bert", "architectures": ["BertForMaskedLM"]}',
    "gpt2/config.json": b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2}',
}
EVALUATE = f"evaluate --models '{{a: {TARGET}}}'"
BENCHMARK = "benchmark --splits '{people: {}}'"
MISTAKES = {
    # ---- a configuration's file
    "key twice": ("unlearn --config twice.yaml", "'twice.yaml': ofmu is there twice, in lines 1 and 3"),
    "option twice": ("unlearn --config inner_twice.yaml", "training.rounds is there twice, in lines 2 and 3"),
    "list as a file": ("unlearn --config list.yaml", "'list.yaml': the file is a list"),
    "list as a section": ("unlearn --config=section.yaml", "'section.yaml', line 1: training is a section"),
    "text as a section": ("unlearn --config text.yaml", "training is a section"),
    "section without options": ("unlearn --config nothing.yaml", "'nothing.yaml', line 2: training is a section"),
    "inner section without options": (
        "unlearn --config inner_nothing.yaml",
        "ofmu.inner is a section, so it must contain options by name (`ofmu.inner: {option: value}`), not nothing",
    ),
    "empty file": ("unlearn --config empty.yaml", "'empty.yaml': the file has no options"),
    "only a comment": ("unlearn --config comment.yaml", "'comment.yaml': the file has no options"),
    "binary file": ("unlearn --config binary.yaml", "'binary.yaml': not a text file"),
    "missing file": ("unlearn --config mine.yaml", "config = 'mine.yaml': cannot be read (No such file or directory)"),
    "broken YAML": ("unlearn --config broken.yaml", "'broken.yaml', line 2: not YAML"),
    "tag in YAML": ("unlearn --config tag.yaml", "'tag.yaml', line 2: not YAML (could not determine a constructor"),
    "list as a key": ("unlearn --config list_key.yaml", "'list_key.yaml', line 1: not YAML (found unhashable key)"),
    "section of another method": ("unlearn --config npo.yaml", "npo: an option of the method npo, but method = ofmu"),
    "shipped configuration misspelt": ("unlearn --config tofu_forget5", "Did you mean tofu_forget05?"),
    # ---- options
    "name outside the storage": ("unlearn --name ../evil", "name = '../evil': must be a folder's name"),
    "hidden name": ("unlearn --name .x", "name = '.x': must be a folder's name"),
    "name of the cache": ("unlearn --name cache", "name = 'cache': must be another"),
    "name of the database": ("unlearn --name mlflow.db-wal", "must be another"),
    "long name": (f"unlearn --name {'x' * 300}", "at most 128 bytes"),
    "negative seed": ("unlearn --seed -3", "seed = -3: must be from 0"),
    "option of another method": ("unlearn --npo.beta 3", "npo.beta: an option of the method npo, but method = ofmu"),
    "option of another than the method": ("unlearn --method npo --ofmu.beta 1", "ofmu.beta: an option of the method"),
    "no GPU": ("unlearn --training.gpus_per_worker 1", "training.gpus_per_worker = 1 GPUs, but torch finds none"),
    "forget is retain": (
        "unlearn --data.retain.path builtin:people/forget.jsonl",
        "data.forget and data.retain are the",
    ),
    "freeze without a match": ("unlearn --model.freeze '[layernom]'", "model.freeze: 'layernom' matches no parameter"),
    "layer too high": ("unlearn --method rmu --rmu.layer 99", "rmu.layer = 99: the model has layers 0 to 3"),
    "layer of another family": ("unlearn --model.path gpt2 --method rmu --rmu.layer 2", "the model has layers 0 to 1"),
    "encoder": ("unlearn --model.path ./bert", "BertForMaskedLM is not a causal language model"),
    "adapter without a module": (
        "unlearn --model.lora.target_modules '[nope]'",
        "model.lora.target_modules = ['nope']",
    ),
    "model on the hub": ("unlearn --model.path nobody/nothing", "'nobody/nothing': no such folder here, and as a name"),
    "rows on the hub": (
        "unlearn --data.forget.path nobody/nothing",
        "nobody/nothing: neither a file or folder here nor",
    ),
    "target that is not trained": (
        "unlearn --model.path runs/tofu_target/model",
        "'runs/tofu_target/model': no such folder; run `ofmu train` first",
    ),
    "abbreviated option": ("unlearn --ofmu.inner_step 3", "--ofmu.inner_step. Did you mean ofmu.inner_steps?"),
    "abbreviated section": ("unlearn --train.rounds 3", "--train.rounds. Did you mean training.rounds?"),
    "one dash": ("unlearn -name x", "unknown option -name. Did you mean name?"),
    "help on nothing": ("unlearn --help ofmuu", "--help ofmuu: no such section. Did you mean ofmu?"),
    "unknown method": ("unlearn --method npoo", "method = npoo: no such choice. Did you mean npo?"),
    "unknown stage": ("unlearn --training.zero_stage 4", "training.zero_stage"),
    "text for a number": ("unlearn --training.rounds many", "training.rounds = many: must be a whole number\n"),
    "text for a list": ("unlearn --model.freeze m", "model.freeze = m: must be a list such as [a, b]"),
    "text for a switch": ("unlearn --evaluation.enabled maybe", "evaluation.enabled = maybe: must be true or false"),
    "text for a number or a word": (
        "unlearn --training.gpus_per_worker x",
        "training.gpus_per_worker = x: must be a number or auto",
    ),
    "text for a rank": ("unlearn --model.lora.rank x", "model.lora.rank = x: must be a whole number\n"),
    "text for modules": (
        "unlearn --model.lora.target_modules q_proj",
        "model.lora.target_modules = q_proj: must be a list such as [a, b] or null",
    ),
    "number for a section": (
        "unlearn --model.lora 3",
        "model.lora = 3: a section of options; give them one by one, such",
    ),
    "path for a section": (
        "unlearn --data.forget x",
        "data.forget = x: a section of options; give them one by one, such",
    ),
    "no rounds": ("unlearn --training.rounds 0", "training.rounds = 0: must be greater than 0"),
    "SGD without a rate": ("unlearn --ofmu.inner.name sgd", "ofmu.inner.lr: give a learning rate"),
    "idle GPU": ("unlearn --training.gpus_per_worker=2", "a worker computes on one GPU"),
    "shared GPU": (
        "unlearn --training.workers=2 --training.gpus_per_worker=0.5",
        "NCCL does not let workers share a GPU",
    ),
    "seed too large": ("unlearn --seed 1180591620717411303424", "must be from 0 to 2^63 - 1"),
    "absolute name": ("unlearn --name /x", "name = '/x': must be a folder's name"),
    "empty name": ("unlearn --name ''", "name = '': must be a folder's name"),
    "adapter of no adapters": (
        "unlearn --export.weights adapter",
        "export.weights = adapter, but no adapters are trained",
    ),
    "size in words": (
        "unlearn --export.max_shard_size big",
        "export.max_shard_size = 'big': must be a number and a unit",
    ),
    "cluster of no set": (
        "unlearn --evaluation.clusters '{forgt: 20}'",
        "evaluation.clusters: no set 'forgt'. Did you mean forget? Sets: forget, retain, real_authors, world_facts, ho",
    ),
    "misspelt option": ("unlearn --ofmu.betta 1", "unknown option --ofmu.betta. Did you mean ofmu.beta?"),
    "misspelt section of a file": (
        "unlearn --config misspelt_section.yaml",
        "unknown option trainig.rounds in the configuration. Did you mean training.rounds?",
    ),
    "unknown option of a section": ("unlearn --ofmu.inner.rate 1", "ofmu.inner has name, lr, clip, "),
    "option without its section": ("unlearn --rho 1", "Did you mean ofmu.rho?"),
    "out of range": ("unlearn --ofmu.beta -1", "ofmu.beta = -1.0: must be 0 or more"),
    "learning rate of one loop": ("unlearn --ofmu.inner.lr 0", "ofmu.inner.lr = 0.0: must be greater than 0"),
    "rank of an adapter": ("unlearn --model.lora.rank 0", "model.lora.rank = 0: must be greater than 0"),
    "missing forget file": ("unlearn --data.forget.path nowhere.jsonl", "data.forget"),
    "missing evaluation file": ("unlearn --evaluation.sets.retain nowhere.jsonl", "evaluation.sets.retain"),
    "model that is not there": ("unlearn --model.path ./nowhere", "model.path = './nowhere': no such folder"),
    "model of the level that is not there": ("unlearn --ofmu.level_model ./nowhere", "ofmu.level_model"),
    "retrained model that is not there": ("unlearn --evaluation.retrained ./nowhere", "evaluation.retrained"),
    "more workers than CPUs": ("unlearn --training.workers 4096 --training.batch_size 4096", "CPUs"),
    "batch that does not divide": ("unlearn --training.workers 2 --training.batch_size 7", "does not divide"),
    "micro-batch that does not divide": ("unlearn --training.micro_batch_size 3", "training.micro_batch_size = 3"),
    "torch engine on two workers": ("unlearn --training.engine torch --training.workers 2", "training.engine"),
    "exact curvature on DeepSpeed": (
        "unlearn --ofmu.curvature exact --training.engine deepspeed",
        "--training.engine torch",
    ),
    "MLflow not reachable": ("unlearn --tracking.uri http://127.0.0.1:9", "tracking.uri"),
    "credentials in the storage": ("unlearn --storage s3://key:secret@bucket/runs", "storage"),
    # ---- ofmu train
    "option of ofmu unlearn": ("train --method npo", "unknown option --method"),
    "heads that do not divide": ("train --scratch.heads 3", "scratch.heads = 3: must be a divisor"),
    "no epochs": ("train --epochs 0", "epochs = 0"),
    "epochs without end": ("train --epochs .inf", "epochs = inf: must be greater than 0 and finite"),
    "mean in bytes": ("train --classifier.mean '[125.3]'", "classifier.mean = [125.3]: must be from 0 (black)"),
    "no deviation": ("train --classifier.std '[0]'", "classifier.std = [0.0]: must be greater than 0"),
    # ---- ofmu evaluate
    "path for models": ("evaluate --models x", "models = x: must be options by name such as {a: b}"),
    "rows for an attack": (
        "evaluate --checks.relearn '{rows: x}'",
        "checks.relearn.rows = x: must be a whole number\n",
    ),
    "questions without a path": ("evaluate --checks.choice '[{name: x}]'", "checks.choice: it lacks path"),
    "reserved label": ("evaluate --models '{retrained: x}'", "models.retrained: give the retrained model as"),
    "label with a space": ("evaluate --models '{a b: x}'", "models = 'a b': must be labelled with"),
    "model to evaluate": ("evaluate --models '{a: ./nowhere}'", "models.a = './nowhere': no such folder"),
    "evaluation switched off": ("evaluate --evaluation.enabled false", "this command only evaluates"),
    "misspelt attack": (
        "evaluate --config attack.yaml",
        "unknown option checks.relern in the configuration. Did you mean checks.relearn?",
    ),
    "option of no attack": ("evaluate --checks.relearn '{rowz: 3}'", "unknown option checks.relearn.rowz"),
    "attack on too few rows": (
        f"{EVALUATE} --evaluation.max_rows 10 --checks.relearn '{{rows: 10}}'",
        "checks.relearn.rows = 10",
        "10 forget rows",
        "lower",
    ),
    "negative rate": ("evaluate --checks.relearn '{lr: -1}'", "checks.relearn.lr", "greater than 0"),
    "more examples than rows": (
        f"{EVALUATE} --evaluation.max_rows 10 --checks.prefix '{{shots: 11}}'",
        "checks.prefix.shots = 11",
        "10 retain rows",
    ),
    "missing questions": (
        f"{EVALUATE} --checks.choice '[{{name: a, path: nowhere.jsonl}}]'",
        "checks.choice[0]",
        "nowhere.jsonl",
    ),
    "questions on the hub": (
        f"{EVALUATE} --data.root . --checks.choice '[{{name: a, path: some/where, format: hub}}]'",
        "checks.choice[0].path = some/where",
        "hub data set",
        "checks.choice[0].hub_split = test",
    ),
    "questions twice": (
        "evaluate --checks.choice '[{name: a, path: x}, {name: a, path: x}]'",
        "checks.choice.name",
        "once",
    ),
    "alignment with nothing": (
        f"{EVALUATE} --checks.alignment true --evaluation.retrained null",
        "checks.alignment",
        "evaluation.retrained",
    ),
    "gradient norms without unseen rows": (
        f"{EVALUATE} --checks.gradient_norm true --evaluation.sets.holdout null",
        "evaluation.sets.holdout",
    ),
    "no models": ("evaluate --models '{}'", "models", "label"),
    "model to evaluate on the hub": ("evaluate --models '{a: some/where/else}'", "models.a", "no such folder"),
    "retrained model to evaluate": (
        f"{EVALUATE} --evaluation.retrained ./nowhere",
        "evaluation.retrained",
        "no such folder",
    ),
    "set to evaluate": (
        f"{EVALUATE} --evaluation.sets.forget nowhere.jsonl",
        "evaluation.sets.forget",
        "nowhere.jsonl",
    ),
    # ---- ofmu sweep
    "field that is not there": (
        "sweep --space.ofmu.bet 'uniform(0, 1)'",
        "space: unknown option ofmu.bet. Did you mean beta",
    ),
    "no prior": ("sweep --space.ofmu.beta 'gaussian(0, 1)'", "space: ofmu.beta: prior 'gaussian(0, 1)'"),
    "misspelt prior": ("sweep --space.ofmu.beta 'loguniforn(1e-3, 1)'", "Did you mean loguniform?"),
    "half a step": ("sweep --space.ofmu.inner_steps 'uniform(1, 2)'", "ofmu.inner_steps = 1.5: must be int"),
    "prior of another method": ("sweep --space.npo.beta 'uniform(0, 1)'", "npo.beta is not an option of"),
    "empty space": (
        "sweep --label ceu --space '{ceu.optimizer.lr: null}'",
        "nothing is left to tune of ceu",
    ),
    "objective of no metric": (
        "sweep --select.objective forget_qualty",
        "no such metric. Did you mean forget_quality",
    ),
    "objective without generations": (
        "sweep --select.utility model_utility --select.max_new_tokens 0",
        "max_new_tokens = 0:",
        "select.utility = model_utility",
    ),
    "objective without a retrained model": (
        "sweep --base.evaluation.retrained null --select.objective forget_quality",
        ": select.objective = forget_quality needs a model without the forget rows: name base.evaluation.retrained, or",
    ),
    "trials without room": (
        "sweep --base.training.workers 4096 --base.training.engine deepspeed --base.training.batch_size 4096",
        "training.workers x training.cpus_per_worker = 4096",
    ),
    "file of a space": ("sweep --space_file nowhere.yaml", "space_file = 'nowhere.yaml': no such file"),
    "unknown label": ("sweep --label ofmu_ful", "no method 'ofmu_ful'. Did you mean ofmu_full"),
    "grace without end": (
        "sweep --early.kind asha --early.stages 3 --early.grace 3",
        "early.grace = 3: must be less than early.stages = 3",
    ),
    "part of a generation": (
        "sweep --search.kind population --search.trials 5 --search.population 4",
        "multiple of search.population = 4",
    ),
    "seed of the trials": ("sweep --select.seeds '[0]'", "0 is the trials' own seed"),
    # ---- ofmu benchmark
    "method of a benchmark": (f"{BENCHMARK} --methods '[npoo]'", "Did you mean npo"),
    "no seeds": (f"{BENCHMARK} --seeds '[]'", "seeds"),
    "metric of a rule": (f"{BENCHMARK} --rule.utility model_utilty", "Did you mean model_utility"),
    "rows of a split": (
        "benchmark --splits '{x: {data.forget.path: nowhere.jsonl}}' --rule.objective ks_statistic",
        "nowhere.jsonl",
    ),
    "space of a benchmark": (
        f"{BENCHMARK} --tuning.spaces '{{npo: {{npo.lr: \"loguniform(1e-4, 1e-2)\"}}}}'",
        "unknown option npo.lr",
    ),
    "rule without generations": (f"{BENCHMARK} --tuning.max_new_tokens 0", "tuning.max_new_tokens = 0"),
    # ---- ofmu submit
    "option of the submitted": ("submit unlearn --trainig.rounds 3", "Did you mean training.rounds"),
    "command to submit": ("submit unlern", "Did you mean unlearn"),
    "option before the command": ("submit --seed 3 unlearn", "follow it"),
    "nothing to submit": ("submit", "give a COMMAND"),
    "storage of one machine": ("submit unlearn", "storage = 'runs'"),
    "credentials for MLflow": ("submit unlearn --storage /s --tracking.uri http://me:word@host", "credentials"),
    "credentials of rows": (
        "submit unlearn --storage /s --data.forget.path 's3://b/k?secret_key=abc'",
        "credentials",
    ),
    "address that is none": ("submit unlearn --storage /s --address head:8265", "address = 'head:8265'"),
    "address without an answer": ("submit unlearn --storage /s --address http://127.0.0.1:1", "no answer"),
    "command beside --stop": ("submit unlearn --storage /s --stop x", "no COMMAND"),
    "--stop beside --status": ("submit --stop x --status y", "one at a time"),
    "file that is not uploaded": ("submit evaluate --storage /s --config ../mine.yaml", "outside"),
    "file of an environment": ("submit evaluate --storage /s --runtime-env none.yaml", "No such file"),
    # ---- other commands
    "GPUs that do not divide": ("plan --plan.gpus 3", "does not divide"),
    "memory in words": ("plan --plan.gpus 2 --plan.gpu_memory eighty", "plan.gpu_memory"),
    "plan of exact curvature": (
        "plan --ofmu.curvature exact --training.engine torch --model.attention eager",
        "finite_difference",
    ),
    "model to push": ("unlearn --push-to-hub a/b/c", "must be OWNER/NAME"),
    "run that is not there": ("show nothing", "no such folder; give the --storage of your runs"),
    "report of no run": ("report nothing", "no such folder; give the --storage of your runs"),
    "show without a name": ("show", "required: name"),
    "log that is not there": ("metrics tofu --log nowhere.json", "nowhere.json"),
    "format of logs": ("metrics muse --log x", "invalid choice: 'muse'"),
    "schema of no command": ("schema unlern", "invalid choice: 'unlern'"),
    "file of a plan": (
        "plan --plan.row_tokens 8 --plan.json nowhere/plan.json",
        "plan.json = 'nowhere/plan.json': cannot be written (no folder nowhere)",
    ),
    "request's command": ("requests frobnicate", "unknown command 'frobnicate'. Commands:"),
    "unknown command": ("unlearm", "Did you mean unlearn?"),
}
"""What is typed, and parts of the message."""
WITHOUT_STORAGE = ("metrics", "schema", "requests", "submit", "unlearm")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the user is, with FILES and mine.yaml one folder above."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    return here


def typed(mistake):
    """The words, and the parts of their message."""
    line, *parts = MISTAKES[mistake]
    words = shlex.split(line)
    storage = [] if words[0] in WITHOUT_STORAGE or "--storage" in words else ["--storage", "runs"]
    return [*words, *storage], parts


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_before_anything_starts(mistake, folder, capsys):
    import ray

    ray.shutdown()  # another file's
    words, parts = typed(mistake)
    message = refused(words, *parts, capsys=capsys)
    assert not re.search("secret|word@|abc", message)
    assert not ray.is_initialized()
    assert {path.name for path in folder.iterdir()} <= {*(Path(name).parts[0] for name in FILES), "runs"}
    if Path("runs").exists():  # no empty folder is left
        assert {path.name for path in folder.glob("runs/*")} == {"cache"}


def test_they_are_no_fewer_than_the_first_walk_found():
    lines = [line for line, *_ in MISTAKES.values()]
    assert len(set(lines)) == len(lines) >= 91


# once refused only after torch was imported: make test times these, make test-all all of them
BEFORE_TORCH = ("freeze without a match", "layer too high", "adapter without a module")
BEFORE_TORCH += ("target that is not trained", "model on the hub", "MLflow not reachable", "rule without generations")
BEFORE_TORCH += ("missing evaluation file", "missing questions", "attack on too few rows", "seed of the trials")
BEFORE_TORCH += ("GPUs that do not divide", "plan of exact curvature", "layer of another family", "encoder")


@pytest.mark.system
@pytest.mark.parametrize(
    "mistake", [pytest.param(one, marks=[] if one in BEFORE_TORCH else pytest.mark.full) for one in MISTAKES]
)
def test_a_mistake_costs_less_than_three_seconds(mistake, folder):
    """CPU seconds of the whole command, which do not depend on what else the machine does."""
    words, parts = typed(mistake)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "pipelines.cli", *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    one_message(done.returncode, done.stdout, done.stderr, *parts)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
