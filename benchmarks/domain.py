"""A model fitted to the questions of two subjects of MMLU forgets one as a domain, from text: OFMU beside RMU and NPO.

    python -m benchmarks.domain --mmlu PATH/test.parquet --model runs/smollm2 --out build/domain [--seeds 1 2]

PATH/test.parquet in the layout of cais/mmlu. A document is a question with its right answer, as the multiple-choice
check asks it (`cloze`: a model of 135 M parameters does not follow letters). The model is fitted to the documents of
both subjects; then each method has the same number of gradient passes at each rate. All questions of both subjects are
asked, and of each other subject --others of the shorter half, which no model was fitted to. Documents of other
questions are the unseen rows that set OFMU's level. The rule is that of pipelines/configs/benchmark_wmdp.yaml: nearest
to chance among the models with 90 % of the target's accuracy on what is kept and on the other subjects, continuations
not degenerate. domain.json grows with each run; runs resume by name. --seeds runs each method's best rate again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import TrainConfig, UnlearnConfig, apply_overrides
from ofmu_ray.config.data import SourceConfig
from ofmu_ray.data.choices import ChoiceRow, choice_rows
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.evaluation.multiple_choice import choice_metrics, prompt
from ofmu_ray.evaluation.sample import spread
from ofmu_ray.metrics.fronts import plain
from ofmu_ray.metrics.generations import sound_generations
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.runs.run import run
from ofmu_ray.storage import atomic_write

PASSES = {"ofmu": 11, "rmu": 2, "npo": 2}
"""Gradient passes of a round: OFMU's default preset has 3 forget and 8 retain passes."""
RATE = {"ofmu": "ofmu.inner.lr", "rmu": "rmu.optimizer.lr", "npo": "npo.optimizer.lr"}
SAMPLES = 1000


def documents(rows: Sequence[ChoiceRow]) -> list[str]:
    """Each question with its right answer, as the check scores it."""
    return [f"{prompt(row, 'cloze')} {row.choices[row.answer].strip()}" for row in rows]


def write_rows(mmlu: Path, out: Path, forget: str, keep: str, others: int) -> None:
    """Documents (forget, retain, train, holdout) and questions (forget_choice, retain_choice) as files in `out`."""
    questions = choice_rows(SourceConfig(path=str(mmlu)), name="mmlu", option="--mmlu")
    subjects: dict[str, list[ChoiceRow]] = {}
    for row in questions:
        subjects.setdefault(str(row.cluster), []).append(row)
    for name in (forget, keep):
        if name not in subjects:
            raise SystemExit(f"no subject {name!r} in {mmlu}; there are {', '.join(sorted(subjects))}")
    asked: list[ChoiceRow] = []
    unseen: list[ChoiceRow] = []
    for name in sorted(subjects.keys() - {forget, keep}):
        short = sorted(subjects[name], key=lambda row: len(row.question) + sum(map(len, row.choices)))
        short = short[: max(others + 1, len(short) // 2)]
        chosen = [short[place] for place in spread(len(short), others + 1)]
        asked += chosen[:-1]
        unseen += chosen[-1:]
    out.mkdir(parents=True, exist_ok=True)
    texts = {"forget": documents(subjects[forget]), "retain": documents(subjects[keep]), "holdout": documents(unseen)}
    for name, lines in (texts | {"train": texts["forget"] + texts["retain"]}).items():
        pq.write_table(pa.table({"text": lines}), out / f"{name}.parquet")
    for name, rows in {"forget_choice": subjects[forget], "retain_choice": subjects[keep] + asked}.items():
        cells = [
            {"question": row.question, "choices": list(row.choices), "answer": row.answer, "subject": row.cluster}
            for row in rows
        ]
        pq.write_table(pa.Table.from_pylist(cells), out / f"{name}.parquet")


def configurations(chosen: argparse.Namespace) -> tuple[TrainConfig, UnlearnConfig]:
    """The fit, and what all runs of `ofmu unlearn` have in common."""
    files, target = chosen.out / "rows", chosen.out / "domain_target/model"
    common: dict[str, Any] = {
        "storage": chosen.out,
        "model.precision": "bf16_autocast",
        "data.format.kind": "text",
        "data.format.max_length": chosen.max_length,
        "training.engine": "torch",
        "training.checkpoint_every": 1000,
        "tracking.system_metrics": "false",
    }
    fit = common | {
        "name": "domain_target",
        "model.path": chosen.model,
        "data.train.path": files / "train.parquet",
        "epochs": chosen.epochs,
        "finetune.optimizer.lr": chosen.fit_rate,
        "training.batch_size": 8,
    }
    unlearning = common | {
        "model.path": target,
        "data.forget.path": files / "forget.parquet",
        "data.retain.path": files / "retain.parquet",
        "data.holdout.path": files / "holdout.parquet",
        "training.batch_size": 4,
        "evaluation.sets.forget_choice": files / "forget_choice.parquet",
        "evaluation.sets.retain_choice": files / "retain_choice.parquet",
        "evaluation.sets.choice_scoring": "cloze",
        "evaluation.max_rows": "null",
        "evaluation.max_new_tokens": 16,
        "evaluation.dtype": "bf16",
    }
    return parse(TrainConfig, _words(fit), "ofmu train"), parse(UnlearnConfig, _words(unlearning), "ofmu unlearn")


def _words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def accuracies(table: pa.Table, keep: str) -> dict[str, Any]:
    """Accuracy on the questions of the forgotten, of the kept and of the other subjects."""
    choice, of_retain = pc.equal(table["set"], "forget_choice"), pc.equal(table["set"], "retain_choice")
    kept = pc.and_(of_retain, pc.equal(table["cluster"], keep))
    groups = {"forget": choice, "keep": kept, "others": pc.and_not(of_retain, kept)}
    measured: dict[str, Any] = {}
    for name, rows in groups.items():
        of_group = table.filter(rows)
        measured[name] = choice_metrics(of_group, samples=SAMPLES, seed=0, name=name)["accuracy"].to_json()
        measured[f"{name}_chance"] = float(np.mean(of_group["chance"].to_numpy()))
    return measured


def runs(chosen: argparse.Namespace, base: UnlearnConfig) -> list[dict[str, Any]]:
    """A line per model: base, target, then each method at each rate, in domain.json as far as it got."""
    evaluator = Evaluator.of(base, chosen.out)
    target = evaluator.table(base.model.path, "target")
    lines = [
        {"model": "base", **accuracies(evaluator.table(str(chosen.model), "base"), chosen.keep)},
        {"model": "target", **accuracies(target, chosen.keep)},
    ]
    sound = sound_generations(target, None, bootstrap_samples=SAMPLES)

    def measure(method: str, rate: float, seed: int) -> None:
        name = f"domain_{method}_{rate:g}" + (f"_seed{seed}" if seed else "")
        changes = {"method": method, RATE[method]: rate, "seed": seed, "name": name}
        outcome = run(apply_overrides(base, {**changes, "training.rounds": chosen.passes // PASSES[method]}))
        after, before = (plain(outcome.metrics[model]) for model in ("after", "before"))
        goal = Goal("forget_choice_above_chance", "retain_choice_accuracy", None, sound=sound)
        goal = replace(goal, floor=chosen.floor * before[goal.utility])
        line = {"model": method, "rate": rate, "seed": seed, "status": outcome.status, "rounds": outcome.rounds}
        line |= {"gradient_passes": outcome.cost["gradient_passes"], "seconds": outcome.cost["seconds"]["rounds"]}
        line |= {"enough": goal.enough(after), "degenerate": goal.degenerate(after), "rank": goal.rank(after)}
        lines.append(line | accuracies(evaluator.table(outcome.model, outcome.name), chosen.keep))
        atomic_write(chosen.out / "domain.json", json.dumps(lines, indent=1) + "\n")

    for rate in chosen.rates:
        for method in PASSES:
            measure(method, rate, 0)
    for line in list(best_of(lines).values()):
        for seed in chosen.seeds:
            measure(line["model"], line["rate"], seed)
    return lines


def best_of(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method -> its best line by the rule, of the runs with seed 0."""
    best: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.get("rank") and not line["seed"]:
            best[line["model"]] = min(best.get(line["model"], line), line, key=lambda one: one["rank"])
    return best


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A line per model, * for each method's best by the rule."""
    best = best_of(lines)
    rows = [["", "model", "rate", "seed", "forget", "keep", "others", "enough", "degenerate"]]
    for line in lines:
        measured = [f"{f['value']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" for f in map(line.get, rows[0][4:7]) if f]
        marks = [str(line.get(name, "")) for name in ("enough", "degenerate")]
        mark = "*" if best.get(line["model"]) is line else ""
        drawn = [f"{line[name]:g}" if name in line else "" for name in ("rate", "seed")]
        rows.append([mark, line["model"], *drawn, *measured, *marks])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmlu", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--forget", default="medical_genetics")
    parser.add_argument("--keep", default="management")
    parser.add_argument("--others", type=int, default=2, help="questions of each other subject")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 5e-5])
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="fresh seeds for each method's best rate")
    parser.add_argument("--passes", type=int, default=88, help="gradient passes of 4 documents per run")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--fit-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--floor", type=float, default=0.9, help="share of the target's utility that is enough")
    chosen = parser.parse_args(words)
    write_rows(chosen.mmlu, chosen.out / "rows", chosen.forget, chosen.keep, chosen.others)
    fit, base = configurations(chosen)
    run(fit)
    print(table(runs(chosen, base)))


if __name__ == "__main__":
    main()
