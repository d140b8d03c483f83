"""What a sweep writes: the chosen configuration and model, tables, the report, MLflow runs, and terminal lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ofmu_ray.metrics.degeneration import words
from ofmu_ray.metrics.fronts import plain
from ofmu_ray.reporting.formats import with_interval
from ofmu_ray.runs.preflight import public
from ofmu_ray.runs.trial import result_path
from ofmu_ray.search.benchmark_output import COSTS, duration, machine
from ofmu_ray.search.choice import BEST, SweepChoice, plane, priors, sound_only
from ofmu_ray.search.judging import marks
from ofmu_ray.search.priors import text_of
from ofmu_ray.search.spaces import Space
from ofmu_ray.search.trial_ledger import TrialLedger, ranked
from ofmu_ray.storage import atomic_write

# ----------------------------------------------------------------------------------------------------------- tables


def trial_rows(ledger: TrialLedger, outcome: SweepChoice) -> list[dict[str, Any]]:
    """One row per trial and per fresh seed, with metrics as columns NAME, NAME_low, NAME_high."""
    goal, rows = ledger.search.goal, []
    for number, suggestion in enumerate(ledger.suggestions):
        result = ledger.result(number)
        if result is None:
            continue
        evaluations = result.get("evaluations") or []
        metrics = result.get("figures") or (evaluations[-1]["figures"] if evaluations else {})
        complete = bool(result.get("figures"))
        rows.append(
            _row(result, number, "search", ledger, metrics)
            | {
                "stage": ledger.stage_count if complete else len(evaluations),
                "selected": number == outcome.chosen,
                "feasible": goal.enough(plain(metrics)) if metrics else None,
                **marks(plain(metrics), goal.sound),
                "front": number in outcome.front,
                "parent": suggestion.parent,
            }
        )
    for _, result in outcome.confirmed:
        metrics = result.get("figures") or {}
        extra: dict[str, Any] = {"stage": ledger.stage_count, "selected": False, "front": False, "parent": None}
        extra |= {"feasible": goal.enough(plain(metrics)) if metrics else None, **marks(plain(metrics), goal.sound)}
        rows.append(_row(result, outcome.chosen, "confirm", ledger, metrics) | extra)
    return rows


def _row(
    result: Mapping[str, Any], number: int | None, phase: str, ledger: TrialLedger, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    row = {
        "number": number,
        "phase": phase,
        "seed": result["seed"],
        "status": result["status"],
        "message": result.get("message", ""),
        "options": json.dumps(result["options"]),
        "stages": ledger.stage_count,
        **{name: result.get(name) for name in COSTS},
        "ended_seconds": result["ended"] - (ledger.started() or result["ended"]),
    }
    evaluations = result.get("evaluations") or []
    if row["flops"] is None and evaluations:  # a run that failed after an evaluation
        row["flops"] = evaluations[-1]["account"]["flops"]
    return row | plain(metrics)


def stage_rows(ledger: TrialLedger) -> list[dict[str, Any]]:
    """One row per intermediate evaluation."""
    goal, rows = ledger.search.goal, []
    for number in range(len(ledger.suggestions)):
        for one in ledger.evaluations(number):
            values = plain(one["figures"])
            rows.append(
                {
                    "number": number,
                    "stage": one["stage"],
                    "flops": one["account"]["flops"],
                    "train_seconds": one["train_seconds"],
                    goal.objective: values.get(goal.objective),
                    goal.utility: values.get(goal.utility),
                }
            )
    return rows


def settings(
    ledger: TrialLedger,
    outcome: SweepChoice,
    references: Mapping[str, Any],
    narrowed: Mapping[str, str],
    command: Sequence[str],
) -> dict[str, Any]:
    """What the report needs in addition to the tables; also written to <folder>/sweep.json."""
    from ofmu_ray.metrics.fronts import hypervolume
    from ofmu_ray.metrics.registry import metric
    from ofmu_ray.reporting.manifest import code_version, package_versions

    config, goal = ledger.config, ledger.search.goal
    ends = [result["ended"] for n in range(len(ledger.suggestions)) if (result := ledger.result(n))]
    points = plane(ledger, sound_only(ledger, ranked(ledger, range(len(ledger.suggestions)))))
    objectives = [goal.objective, goal.utility] if config.search.kind == "multi_objective" else []
    chosen = None
    if outcome.chosen is not None:
        chosen = {
            "number": outcome.chosen,
            "options": dict(ledger.suggestions[outcome.chosen].options),
            "floor_missed": False,
            "figures": outcome.metrics,
            "config_file": "best.yaml",
            "model": f"{BEST}/model" if outcome.metrics else None,
        }
    return {
        "name": config.name,
        "command": list(command),
        "config": public(config),
        "method": config.label,
        "machine": machine(),
        "code": code_version(),
        "packages": package_versions(("torch", "ray", "optuna", "transformers")),
        "seconds": max(ends) - (ledger.started() or max(ends)) if ends else 0.0,
        "rule": {
            "objective": goal.objective,
            "utility": goal.utility,
            "floor": goal.floor,
            "margin": goal.margin,
            "utility_floor": config.select.utility_floor,
            "relative_to": config.select.relative_to,
            "tie_break": config.select.tie_break,
            "sound": goal.sound and asdict(goal.sound),
            "objectives": [*objectives, *(["flops"] if config.search.cost else [])],
            "higher_is_better": {name: metric(name).better == "high" for name in (goal.objective, goal.utility)}
            | {"flops": False},
        },
        "search": {
            **{name: getattr(config.search, name) for name in ("kind", "trials", "seed")},
            "rows": config.select.rows,
            "early": {
                "kind": "none" if config.search.kind == "population" else config.early.kind,
                "stages": ledger.stage_count,
                "grace": config.early.grace,
                "reduction_factor": config.early.reduction_factor,
            },
        },
        "space": space_rows(ledger.search.space),
        "references": references,
        "chosen": chosen,
        "nearest": outcome.nearest,
        "hypervolume": hypervolume(points, (0.0, 0.0)) if points else 0.0,
        "priors": dict(narrowed),
    }


def space_rows(space: Space) -> list[dict[str, Any]]:
    """The tuned fields, in readable form."""
    return [{"field": k.field, "prior": text_of(k.prior), "why": k.why, "given": k.given} for k in space.knobs]


def write(
    ledger: TrialLedger, outcome: SweepChoice, references: Mapping[str, Any], command: Sequence[str]
) -> list[Path]:
    """Write trials.parquet, sweep.json, priors.yaml and the report; return their paths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ofmu_ray.reporting.sweep_page import write_sweep_report

    folder, narrowed = ledger.folder, priors(ledger)
    rows, steps = trial_rows(ledger, outcome), stage_rows(ledger)
    content = settings(ledger, outcome, references, narrowed, command)
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), buffer)
    paths = [folder / "trials.parquet", folder / "sweep.json"]
    atomic_write(paths[0], buffer.getvalue().to_pybytes())
    atomic_write(paths[1], json.dumps(content, indent=1) + "\n")
    if narrowed:
        head = (
            f"# From the best trials of sweep {ledger.config.name}: ofmu sweep --space_file {folder / 'priors.yaml'}\n"
        )
        atomic_write(folder / "priors.yaml", head + yaml.safe_dump(narrowed, sort_keys=False))
        paths.append(folder / "priors.yaml")
    if outcome.chosen is not None:
        paths.append(folder / "best.yaml")
    return [*paths, *map(Path, write_sweep_report(folder, rows, steps, content))]


# ----------------------------------------------------------------------------------------------------------- MLflow


def log_child(ledger: TrialLedger, number: int, parent: Any) -> None:
    """Close the MLflow run of a finished trial, once; a marker file records it."""
    from ofmu_ray import tracking
    from ofmu_ray.search.tuner import child_run

    marker = result_path(ledger.folder, ledger.key(number)).with_suffix(".mlflow")
    result = ledger.result(number)
    if result is None or marker.exists():
        return
    handle = child_run(ledger.config.base.tracking, ledger, number, parent, result)
    if handle is None:
        return  # MLflow does not answer; the next start tries again
    costs = {name: result[name] for name in COSTS if result.get(name) is not None}
    evaluations = result.get("evaluations") or []  # none of a trial whose process died
    metrics = result.get("figures") or (evaluations[-1]["figures"] if evaluations else None)
    failed = result["status"] == "failed"
    described = partial(tracking.describe_words, command="ofmu sweep", commit=None, text=line(ledger, number))
    status: Any = "FAILED" if failed else "FINISHED"
    if tracking.finish(handle, metrics={"after": metrics}, cost=costs, described=described, status=status):
        atomic_write(marker, handle.run_id)


# ----------------------------------------------------------------------------------------------------------- people


def line(ledger: TrialLedger, number: int) -> str:
    """How a trial finished."""
    result, goal = ledger.result(number), ledger.search.goal
    if result is None:
        evaluations = ledger.evaluations(number)
        values, status = (
            (plain(evaluations[-1]["figures"]) if evaluations else {}),
            f"stopped after {len(evaluations)} evaluations",
        )
        seconds = 0.0
    else:
        evaluations = result.get("evaluations") or []
        last = result.get("figures") or (evaluations[-1]["figures"] if evaluations else {})
        values, seconds = plain(last), result.get("total_seconds") or 0.0
        status = "" if result["status"] == "finished" else f"{result['status']}: {result.get('message', '')}"
    shown = [f"{name} {values[name]:.3g}" for name in (goal.objective, goal.utility) if values.get(name) is not None]
    return ", ".join([*shown, *([status] if status else []), *([duration(seconds)] if seconds else [])])


def summary(ledger: TrialLedger, outcome: SweepChoice) -> str:
    """The choice, or the front and the nearest trial."""
    goal, lines = ledger.search.goal, []

    def shown(number: int) -> str:
        values = plain((ledger.result(number) or {})["figures"])
        cells = [f"{name} {values[name]:<10.4g}" for name in (goal.objective, goal.utility)]
        options = [f"{name}={value}" for name, value in ledger.suggestions[number].options.items()]
        return f"  trial {number:<5}" + " ".join([*cells, *options])

    if outcome.front:
        lines += ["", "Pareto front:", *map(shown, outcome.front)]
    if outcome.chosen is not None:
        metrics = outcome.metrics or {}
        gone = "its model was not kept (keep_models); best.yaml trains it again"
        lines += ["", f"chosen: trial {outcome.chosen}; {'on all rows:' if metrics else gone}"]
        for name in (goal.objective, goal.utility):
            metric_value = metrics.get(name) or {}
            if metric_value.get("value") is not None:
                lines.append(f"  {name} {with_interval(metric_value)}")
        for seed, result in outcome.confirmed:
            values = plain(result.get("figures") or {})
            cells = [f"{n} {values[n]:.4g}" for n in (goal.objective, goal.utility) if values.get(n) is not None]
            lines.append(f"  seed {seed}: " + (", ".join(cells) or f"{result['status']}: {result.get('message', '')}"))
    elif outcome.nearest is not None:
        nearest = plain((ledger.result(outcome.nearest) or {})["figures"])
        why = f"no trial has {goal.utility} >= {goal.floor:.4g}"
        if goal.degenerate(nearest):
            why = f"all trials are degenerate ({words(nearest, goal.sound)})"
        lines += ["", f"{why}; the nearest:", shown(outcome.nearest)]
    else:
        lines += ["", "no trial completed with metrics"]
    return "\n".join(lines)
