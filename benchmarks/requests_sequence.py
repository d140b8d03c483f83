"""Requests one after another, in one batch, and retraining: utility, forgetting of new and earlier requests, cost.

    python -m benchmarks.requests_sequence people --out build/sequence --json benchmarks/requests_sequence.json
    python -m benchmarks.requests_sequence tofu --out build/sequence --json benchmarks/requests_sequence.json \
        --data TOFU --model runs/tofu_target/model \
        --retrained runs/tofu_retain90/model runs/tofu_retain90_seed1/model runs/tofu_retain90_seed2/model

people: ten requests, each one invented person of the built-in corpus (eight rows): the six of the forget set and
retained people whose facts occur in no other row. tofu: forget01, the rest of forget05, the rest of forget10. All ways
end with the same rows forgotten. The pipeline itself does the work (`ofmu requests process`, one recipe), in this
process and without Ray; retraining fits the model again without the rows. What is done already is read: the same
command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import SourceConfig, TrainConfig
from ofmu_ray.config.promotion import GateConfig, RecipeConfig
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.metrics.intervals import over_seeds
from ofmu_ray.requests.gate_tables import GateMeasurement
from ofmu_ray.requests.gates import decide
from ofmu_ray.requests.intake import open_ledger
from ofmu_ray.requests.ladder import RequestBatch
from ofmu_ray.requests.process import process
from ofmu_ray.requests.registry import Registry
from ofmu_ray.requests.request_rows import gate_rows
from ofmu_ray.requests.signing import Keys
from ofmu_ray.requests.vault import write_master_key
from ofmu_ray.runs.run import run
from ofmu_ray.storage import atomic_write

CONFIGS = Path(__file__).resolve().parent.parent / "pipelines/configs"
OPEN: dict[str, Any] = {"at_least": -1e9, "at_most": 1e9, "if_absent": "skip"}
"""Bounds that let every result through: figures are wanted."""
FIGURES = {
    "new": GateConfig(metric="forget_probability", against="holdout", **OPEN),
    "earlier": GateConfig(metric="forget_probability", against="holdout", rows="earlier", **OPEN),
    "auc": GateConfig(metric="mia_min_k_auc", **OPEN),
    "utility": GateConfig(metric="model_utility", **OPEN),
    "retain": GateConfig(metric="retain_probability", **OPEN),
}
"""new, earlier: probability of requested rows minus that of rows that no model saw."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Data, models and options of a sequence."""

    requests: list[Rows]
    words: list[str]
    """Options of `ofmu requests`."""
    train: str
    """File that the model was trained on."""
    retrained: tuple[Path, ...] = ()
    """Models that were trained without the rows, one per seed; none: fitted here."""


def people_case(count: int) -> Case:
    """The built-in corpus."""
    files = [Path(resolve_builtin(f"builtin:people/{name}.jsonl")) for name in ("forget", "retain")]
    forget, retain = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    groups = [forget[start : start + 8] for start in range(0, 48, 8)]
    groups += [retain[8 * person : 8 * person + 8] for person in range(1, 54, 2)]  # those without other rows
    words = ["--config", str(CONFIGS / "requests_people.yaml"), "--evaluation.max_rows", "32"]
    return Case(groups[:count], words, resolve_builtin("builtin:people/full.jsonl"))


def tofu_case(data: Path, model: Path, retrained: Sequence[Path]) -> Case:
    """TOFU's forget sets, each without the one before; retrained: on retain90, one model per seed."""
    sets = [json_rows(data / f"forget{share}.json") for share in ("01", "05", "10")]
    groups: list[Rows] = []
    for rows in sets:
        before = {row["question"] for group in groups for row in group}
        groups.append([row for row in rows if row["question"] not in before])
    words = ["--config", str(CONFIGS / "tofu_forget10.yaml"), "--data.root", str(data), "--model.path", str(model)]
    words += ["--requests.train.path", "full.json", "--evaluation.sets.forget", "null"]
    words += ["--training.engine", "torch", "--training.workers", "1", "--evaluation.retrained", "null"]
    words += ["--evaluation.max_rows", "60"]
    return Case(groups, words, str(data / "full.json"), tuple(retrained))


def json_rows(path: Path) -> Rows:
    """Question and answer of a file of JSON objects, one a line or in a list."""
    text = path.read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    return [{name: row[name] for name in ("question", "answer")} for row in rows]


def configured(case: Case, out: Path, seed: int) -> RequestsConfig:
    """One recipe, open gates, short generations, no Ray."""
    words = [*case.words, "--storage", str(out), "--seed", str(seed), "--tracking.system_metrics", "false"]
    words += ["--evaluation.max_new_tokens", "24", "--evaluation.bootstrap_samples", "200"]
    config = parse(RequestsConfig, words, "ofmu requests")
    promotion = replace(config.requests.promotion, recipes=[RecipeConfig(name="base")], gates=list(FIGURES.values()))
    return replace(config, requests=replace(config.requests, promotion=promotion))


def worked_off(config: RequestsConfig, batches: Sequence[Sequence[Rows]]) -> list[dict[str, Any]]:
    """Work off the batches, one after another; figures after each."""
    assert config.key_file is not None
    if write_master_key(config.key_file):
        Keys(config.signing_keys).create()
    lines = []
    for number, batch in enumerate(batches):
        with open_ledger(config) as ledger:
            added = [
                ledger.add(f"{number}-{index}", {"rows": [number, index]}, rows, deadline=timedelta(days=30))
                for index, rows in enumerate(batch)
            ]
        if any(one.state != "promoted" for one in added):
            outcomes = process(config)
            assert [one.state for one in outcomes] == ["promoted"], outcomes
        with open_ledger(config) as ledger:
            document = ledger.certificate(added[0].id)
        assert document is not None
        content = json.loads(document)["certificate"]
        lines.append(figures(content["gates"]) | cost(content["cost"]))
        print(json.dumps({"storage": config.storage, "batch": number, **lines[-1]}), flush=True)
    return lines


def figures(gates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Value of each figure; null where there are no such rows."""
    found = {gate["name"]: gate["value"] for gate in gates}
    return {name: found[gate.name] for name, gate in FIGURES.items()}


def cost(account: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds are left out: they tell what else the machine had to do."""
    return {"passes": sum(account["gradient_passes"].values()), "flops": account["flops"]}


def retrained(case: Case, config: RequestsConfig, out: Path, seed: int, given: Path | None) -> dict[str, Any]:
    """A model that never saw the rows, measured like the others, and what it cost."""
    account: dict[str, Any] = {"passes": None, "flops": None}
    if given is None:
        gone = {(row["question"], row["answer"]) for rows in case.requests for row in rows}
        kept = [row for row in json_rows(Path(case.train)) if (row["question"], row["answer"]) not in gone]
        atomic_write(out / "kept.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        words = ["--config", str(CONFIGS / "people_target.yaml"), "--storage", str(out), "--seed", str(seed)]
        training = parse(TrainConfig, [*words, "--name", f"retrained-{seed}"], "ofmu train")
        training = replace(training, data=replace(training.data, train=SourceConfig(path=str(out / "kept.jsonl"))))
        outcome = run(training)
        model, account = str(outcome.model), cost(outcome.cost)
    else:
        model = str(given)
        if (given.parent / "training.json").is_file():
            account = cost(json.loads((given.parent / "training.json").read_text())["account"])
    return measured(config, model) | account


def measured(config: RequestsConfig, model: str) -> dict[str, Any]:
    """Figures of a model on the rows of a storage in which all requests were worked off as one batch."""
    registry = Registry(config.tracking, str(config.storage), config.requests.promotion.model_name)
    with open_ledger(config) as ledger:
        requests = ledger.all(("promoted",))
        rows = gate_rows(config, ledger, requests)
        batch = RequestBatch(config, str(config.storage), ledger, registry, requests, "")
        settings = batch.run_config(registry.version("1"), config.requests.promotion.recipes[0])
    measurement = GateMeasurement(settings, str(config.storage), list(FIGURES.values()), rows)
    measurement.champion = model  # nothing is compared with it
    return figures([gate.to_json() for gate in decide(list(FIGURES.values()), measurement.tables(model))])


def over(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and interval over seeds of each figure."""
    found = {}
    for name in lines[0]:
        values = [line[name] for line in lines]
        found[name] = None if None in values else over_seeds(values).to_json()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("people", "tofu"))
    parser.add_argument("--out", type=Path, required=True, help="storage")
    parser.add_argument("--requests", type=int, default=10, help="people: how many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="where to add the figures")
    parser.add_argument("--data", type=Path, help="tofu: folder of its files")
    parser.add_argument("--model", type=Path, help="tofu: the target")
    parser.add_argument("--retrained", type=Path, nargs="+", help="tofu: models fitted to retain90, one per seed")
    options = parser.parse_args()
    case = people_case(options.requests)
    if options.case == "tofu":
        models = [model.resolve() for model in options.retrained]
        if len(models) != len(options.seeds):
            parser.error(f"--retrained has {len(models)} models for {len(options.seeds)} seeds: give one per seed")
        case = tofu_case(options.data.resolve(), options.model.resolve(), models)
    ways: dict[str, list[list[dict[str, Any]]]] = {"one after another": [], "one batch": [], "retraining": []}
    done = []
    for seed, model in zip_longest(options.seeds, case.retrained):
        out = options.out.resolve() / options.case / str(seed)
        batch = configured(case, out / "batch", seed)
        ways["one after another"].append(
            worked_off(configured(case, out / "each", seed), [[one] for one in case.requests])
        )
        ways["one batch"].append(worked_off(batch, [case.requests]))
        ways["retraining"].append([retrained(case, batch, out, seed, model)])
        done.append(seed)
        written(options.json, options.case, done, ways)


def written(path: Path | None, case: str, seeds: list[int], ways: Mapping[str, list[list[dict[str, Any]]]]) -> None:
    """Print the figures over the seeds so far, and add them to the file."""
    figures_ = {way: [over(lines) for lines in zip(*by_seed, strict=True)] for way, by_seed in ways.items()}
    result = {case: {"seeds": seeds, "ways": figures_}}
    print(json.dumps(result, indent=1), flush=True)
    if path is not None:
        before = json.loads(path.read_text()) if path.is_file() else {}
        atomic_write(path, json.dumps(before | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
