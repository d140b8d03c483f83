"""The runs of a benchmark one by one: what the rule chose, all runs, and the failures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ofmu_ray.metrics.fronts import Trial, number_of
from ofmu_ray.metrics.registry import metric
from ofmu_ray.metrics.rule import select
from ofmu_ray.reporting import formats
from ofmu_ray.reporting.benchmark_results import BenchmarkData
from ofmu_ray.reporting.tables import Cell, Table, cells


def selected_table(benchmark: BenchmarkData, split: str) -> tuple[Table | None, list[str]]:
    """The options that the reported runs use, and where they differ from the rule's choice."""
    rows, records, notes = [], [], []
    target = benchmark.target_utility(split, "tune")
    for method in benchmark.methods(split):
        tuned = benchmark.runs(split, method, "tune")
        marked = next((trial for trial in tuned if trial.get("selected")), None)
        if not tuned:
            continue
        choice = select(tuned, benchmark.goal(split)) if target is not None else None
        if marked is not None and choice is not None and choice.trial["trial"] != marked["trial"]:
            notes.append(f"{method}: trial {marked['trial']} was used, but the rule chooses {choice.trial['trial']}.")
        chosen = marked or (choice.trial if choice else None)
        done = sum(number_of(trial, benchmark.objective) is not None for trial in tuned)
        utility = None if chosen is None else number_of(chosen, benchmark.utility)
        share = (f"{utility / target:.3f} of the target's",) if utility and target else ()
        missed, degenerate = choice is not None and choice.floor_missed, choice is not None and choice.degenerate
        why = ("no trial reaches the floor ▽",) * missed + ("all trials are degenerate ⊘",) * degenerate
        rows.append(
            cells(
                method,
                Cell(options_words(chosen) if chosen else "none yet", why),
                "–" if chosen is None else str(chosen["trial"]),
                f"{done} of {len(tuned)}",
                formats.number(None if chosen is None else number_of(chosen, benchmark.objective)),
                Cell(formats.number(utility), share),
            )
        )  # fmt: skip
        records.append(
            {
                "split": split, "method": method, "trial": chosen["trial"] if chosen else None,
                "options": chosen.get("options") if chosen else None, "floor_missed": missed, "degenerate": degenerate,
                "trials": len(tuned), "trials_with_figures": done,
            }
        )  # fmt: skip
    header = ["Method", "Options", "Trial", "Trials with metrics", formats.label(benchmark.objective),
              formats.label(benchmark.utility)]  # fmt: skip
    refine = benchmark.settings.refine
    second = f" (a method's last {refine} draws come from a quarter of each range around the best of the others)"
    caption = (
        f"Options chosen by the rule{second if refine else ''}, and the chosen trial's metrics on the rows that tuning "
        "is judged on"
    )
    table = Table(name="selected", caption=caption, header=header, rows=rows, words=2, records=records)
    return (table if rows else None), notes


def options_words(trial: Trial) -> str:
    """{"npo.beta": 0.1} -> npo.beta = 0.1."""
    options: Mapping[str, Any] = json.loads(trial.get("options") or "{}")
    words = (
        f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}" for name, value in options.items()
    )
    return ", ".join(words) or "defaults"


def runs_table(benchmark: BenchmarkData, split: str) -> Table:
    """Every run of every phase, whether chosen or not."""
    names = list(dict.fromkeys((benchmark.objective, metric(benchmark.objective).compared, benchmark.utility)))
    rows = []
    order = {"report": 0, "ablation": 1, "tune": 2}
    trials = [trial for trial in benchmark.trials if trial["split"] == split]
    for trial in sorted(trials, key=lambda t: order.get(t["phase"], 3)):
        number = f"trial {trial.get('trial')}" if trial["phase"] == "tune" else f"seed {trial.get('seed')}"
        used = number_of(trial, "flops") if trial.get("budget_unit") == "flops" else passes(trial)
        budget = number_of(trial, "budget")
        rows.append(
            cells(
                trial["method"], trial["phase"], f"{number}{', chosen' if trial.get('selected') else ''}",
                str(trial.get("status")).replace("_", " ") + ", degenerate ⊘" * bool(trial.get("degenerate")),
                *(formats.number(number_of(trial, name)) for name in names),
                "–" if used is None or not budget else f"{100 * used / budget:.1f} %",
                formats.duration(number_of(trial, "train_seconds") or 0.0),
            )
        )  # fmt: skip
    header = ["Method", "Phase", "Run", "Status", *map(formats.label, names), "Of the budget", "Training"]
    return Table(name="", caption="Every run", header=header, rows=rows, words=4, folded=True)


def passes(trial: Trial) -> float | None:
    """Gradient passes of both kinds."""
    forget, retain = number_of(trial, "forget_passes"), number_of(trial, "retain_passes")
    return None if forget is None or retain is None else forget + retain


def failures_table(benchmark: BenchmarkData) -> Table | None:
    """Runs that did not finish as planned, with the reason."""
    bad = [trial for trial in benchmark.trials if trial.get("status") != "finished"]
    records = [
        {name: trial.get(name) for name in ("split", "method", "phase", "trial", "seed", "status", "message")}
        for trial in bad
    ]
    rows = [cells(*("" if value is None else str(value).replace("_", " ") if name == "status" else str(value)
                    for name, value in record.items())) for record in records]  # fmt: skip
    header = ["Split", "Method", "Phase", "Trial", "Seed", "Status", "Reason"]
    return Table(name="failures", caption="", header=header, rows=rows, words=7, records=records) if rows else None
