"""Requests one after another, in one batch, and retraining: utility, forgetting of new and earlier requests, cost.

    python -m benchmarks.requests_sequence --out build/sequence --requests 10 --seeds 0 1 2 \
        --json benchmarks/requests_sequence.json

Each request is one invented person of the built-in corpus (eight rows): the six of the forget set and retained people
whose facts occur in no other row. All ways end with the same rows forgotten. The pipeline itself does the work
(`ofmu requests process`, one recipe); retraining fits the built-in target again without the rows (`ofmu train`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import SourceConfig, TrainConfig
from ofmu_ray.config.promotion import RecipeConfig
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.metrics.intervals import over_seeds
from ofmu_ray.requests.gate_tables import GateMeasurement
from ofmu_ray.requests.intake import open_ledger
from ofmu_ray.requests.ladder import Batch
from ofmu_ray.requests.process import process
from ofmu_ray.requests.registry import Registry
from ofmu_ray.requests.request_rows import gate_rows
from ofmu_ray.requests.signing import Keys
from ofmu_ray.requests.vault import write_master_key
from ofmu_ray.runs.run import run
from ofmu_ray.storage import atomic_write
from pipelines.parse import parse

CONFIG = Path(__file__).resolve().parent.parent / "pipelines/configs/requests_people.yaml"
TRAIN = CONFIG.with_name("people_target.yaml")
FIGURES = {"new": ("forget_probability", "requested"), "earlier": ("forget_probability", "earlier"),
           "unseen": ("forget_probability", "holdout"), "utility": ("model_utility", "requested")}  # fmt: skip
"""What is reported -> metric and rows."""


def people(count: int) -> list[list[dict[str, Any]]]:
    """The rows of each request."""
    files = [Path(resolve_builtin(f"builtin:people/{name}.jsonl")) for name in ("forget", "retain")]
    forget, retain = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    groups = [forget[start : start + 8] for start in range(0, 48, 8)]
    groups += [retain[8 * person : 8 * person + 8] for person in range(1, 54, 2)]  # those without other rows
    return groups[:count]


def configured(out: Path, seed: int) -> RequestsConfig:
    """The example's configuration, with one recipe and gates that let every result through: figures are wanted."""
    config = parse(RequestsConfig, ["--config", str(CONFIG), "--storage", str(out)], "ofmu requests")
    gates = [replace(gate, at_least=-1e9, at_most=1e9, if_absent="skip") for gate in config.requests.promotion.gates]
    gates = [gate for gate in gates if not gate.relearns]
    promotion = replace(config.requests.promotion, recipes=[RecipeConfig(name="base")], gates=gates)
    return replace(config, seed=seed, requests=replace(config.requests, promotion=promotion))


def worked_off(config: RequestsConfig, batches: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Work off the batches, one after another; figures after each."""
    shutil.rmtree(config.storage, ignore_errors=True)
    assert config.key_file is not None
    write_master_key(config.key_file)
    Keys(config.signing_keys).create()
    lines = []
    for number, batch in enumerate(batches):
        with open_ledger(config) as ledger:
            for index, rows in enumerate(batch):
                ledger.add(f"{number}-{index}", {"rows": [number, index]}, rows, deadline=timedelta(days=30))
        started = time.perf_counter()
        (outcome,) = process(config)
        seconds = time.perf_counter() - started
        assert outcome.state == "promoted", outcome
        lines.append(measured(config, outcome.batch, str(outcome.version)) | {"seconds": seconds})
        print(json.dumps({"batch": number, **lines[-1]}), flush=True)
    return lines


def measured(config: RequestsConfig, batch: str, version: str) -> dict[str, Any]:
    """Figures of a promoted version, from the tables that its gates were decided on, and its run's cost."""
    registry = Registry(config.tracking, str(config.storage), config.requests.promotion.model_name)
    made = registry.version(version)
    base = registry.version(made.replaces or "1")
    with open_ledger(config) as ledger:
        requests = [one for one in ledger.all(("promoted",)) if one.batch == batch]
        work = Batch(config, str(config.storage), ledger, registry, requests, "")
        rows = gate_rows(config, ledger, requests)
        settings = work.run_config(base, config.requests.promotion.recipes[0])
        tables = GateMeasurement(settings, str(config.storage), config.requests.promotion.gates, rows).tables(made.path)
    cost = json.loads((Path(made.path).parent / "metrics.json").read_text())["cost"]
    there = {name: place for name, place in FIGURES.items() if name != "earlier" or tables.earlier}
    named = {name: tables.figure(metric, "result", of) for name, (metric, of) in there.items()}
    shown = {name: [one.value, one.low, one.high] for name, one in named.items() if one.value is not None}
    return {
        **{name: shown.get(name) for name in FIGURES},
        "passes": sum(cost["gradient_passes"].values()),
        "flops": cost["flops"],
    }


def retrained(out: Path, rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The built-in target fitted again without the rows, and what that cost."""
    gone = {(row["question"], row["answer"]) for row in rows}
    full = Path(resolve_builtin("builtin:people/full.jsonl")).read_text().splitlines()
    kept = [line for line in full if (json.loads(line)["question"], json.loads(line)["answer"]) not in gone]
    out.mkdir(parents=True, exist_ok=True)
    (out / "kept.jsonl").write_text("\n".join(kept) + "\n")
    words = ["--config", str(TRAIN), "--storage", str(out), "--name", f"retrained-{seed}", "--seed", str(seed)]
    config = parse(TrainConfig, words, "ofmu train")
    config = replace(config, data=replace(config.data, train=SourceConfig(path=str(out / "kept.jsonl"))))
    started = time.perf_counter()
    outcome = run(config)
    passes = sum(outcome.cost["gradient_passes"].values())
    return {"passes": passes, "flops": outcome.cost["flops"], "seconds": time.perf_counter() - started}


def over(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and interval over seeds of each figure."""
    found = {}
    for name in lines[0]:
        values = [line[name][0] if isinstance(line[name], list) else line[name] for line in lines]
        found[name] = over_seeds(values).to_json() if None not in values else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="storage; deleted first")
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--no-retraining", action="store_true")
    options = parser.parse_args()
    rows = people(options.requests)
    ways: dict[str, list[list[dict[str, Any]]]] = {"one after another": [], "one batch": [], "retraining": []}
    for seed in options.seeds:
        out = options.out / str(seed)
        ways["one after another"].append(worked_off(configured(out / "each", seed), [[one] for one in rows]))
        ways["one batch"].append(worked_off(configured(out / "batch", seed), [rows]))
        if not options.no_retraining:
            ways["retraining"].append([retrained(out, [row for one in rows for row in one], seed)])
    result = {way: [over(lines) for lines in zip(*by_seed, strict=True)] for way, by_seed in ways.items() if by_seed}
    text = json.dumps({"requests": options.requests, "seeds": options.seeds, "ways": result}, indent=1) + "\n"
    print(text)
    if options.json is not None:
        atomic_write(options.json, text)


if __name__ == "__main__":
    main()
