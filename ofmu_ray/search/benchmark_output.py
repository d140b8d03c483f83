"""What a benchmark writes: tables of its runs and of all rows, MLflow runs, the report, and terminal lines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ofmu_ray.config import BenchmarkConfig
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.degeneration import SoundRange
from ofmu_ray.metrics.fronts import geometric_mean, plain
from ofmu_ray.metrics.registry import metric
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.reporting.formats import with_interval
from ofmu_ray.runs.preflight import public
from ofmu_ray.runs.trial import SplitData, Trial, result_path
from ofmu_ray.search.judging import cut, marks, sound_of
from ofmu_ray.storage import atomic_write

COSTS = (
    "forget_passes", "retain_passes", "updates", "tokens", "flops", "train_seconds", "total_seconds",
    "peak_memory_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class ChosenTrial:
    """The tuning trial whose options the reported runs of a method on a split use."""

    trial: int
    options: Mapping[str, Any]
    floor_missed: bool
    degenerate: bool = False


def round_cost(result: Mapping[str, Any], data: SplitData) -> dict[str, float]:
    """Expected passes and FLOPs of a round, from the cost of a few, corrected for their batches' lengths.

    The measured FLOPs count every text that a pass reads (a refusal next to the answer, say) and the share of the model
    that it runs. They are scaled by the ratio of an average row's length to that of the measured rows.
    """
    rounds = result["rounds"]
    passes = {"forget": result["forget_passes"], "retain": result["retain_passes"]}
    streams = data.prepared.streams
    expected = sum(count * streams[kind].tokens / streams[kind].used_rows for kind, count in passes.items() if count)
    measured = sum(count * result["mean_tokens"][kind] for kind, count in passes.items() if count)
    return {
        "passes": sum(passes.values()) / rounds,
        "flops": result["flops"] / rounds * float(expected / measured),
    }


def trial_row(
    trial: Trial, result: Mapping[str, Any], selected: bool = False, sound: SoundRange | None = None
) -> dict[str, Any]:
    """One row of the trials table; `sound`: the range that its generations should be in."""
    row = {
        "method": trial.method,
        "split": trial.split,
        "phase": trial.phase,
        "trial": trial.trial,
        "seed": trial.config.seed,
        "status": result["status"],
        "message": result.get("message", ""),
        "selected": selected,
        "options": json.dumps(dict(trial.options)),
        "budget_unit": trial.budget_unit,
        "budget": trial.budget,
        **{name: result.get(name) for name in COSTS},
    }
    values = plain(result.get("figures") or {})
    return row | marks(values, sound) | values


def write(
    folder: Path,
    config: BenchmarkConfig,
    data: Mapping[str, SplitData],
    references: Mapping[str, Mapping[str, Any]],
    done: Sequence[tuple[Trial, dict[str, Any]]],
    selected: Mapping[tuple[str, str], ChosenTrial],
    goals: Mapping[str, Goal],
    command: list[str],
) -> list[Path]:
    """Write trials.parquet, rows.parquet (no text), benchmark.json and the report; return their paths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ofmu_ray.reporting.benchmark_page import write_benchmark_report
    from ofmu_ray.reporting.manifest import code_version, package_versions

    done = sorted(done, key=lambda one: _place(one[0], config))
    rows, parts = _rows(folder, data, references, done, selected, goals)
    names = list(dict.fromkeys(name for row in rows for name in row))
    trials = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    all_rows = pa.concat_tables(parts, promote_options="permissive")
    settings = {
        "name": config.name,
        "command": command,
        "config": public(config),
        "code": code_version(),
        "packages": package_versions(("torch", "ray", "transformers")),
        "machine": machine(),
        "references": {split: _reference_metrics(tables, config) for split, tables in references.items()},
        "goals": {split: asdict(goal) for split, goal in goals.items()},
        "chosen": [{"split": split, "method": label, **asdict(choice)} for (split, label), choice in selected.items()],
    }
    paths = [folder / "trials.parquet", folder / "rows.parquet", folder / "benchmark.json"]
    for path, table in zip(paths, (trials, all_rows), strict=False):
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        atomic_write(path, buffer.getvalue().to_pybytes())
    atomic_write(paths[-1], json.dumps(settings, indent=1) + "\n")
    return [*paths, *map(Path, write_benchmark_report(folder, trials, all_rows, settings))]


def _rows(
    folder: Path,
    data: Mapping[str, SplitData],
    references: Mapping[str, Mapping[str, Any]],
    done: Sequence[tuple[Trial, dict[str, Any]]],
    selected: Mapping[tuple[str, str], ChosenTrial],
    goals: Mapping[str, Goal],
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The rows of the trials table, and the per-row values of all models."""
    import pyarrow.parquet as pq

    from ofmu_ray.metrics.aggregate import aggregate_inputs, aggregate_metrics

    parts = [
        _labelled(table, (model, split, "reference", None, None))
        for split, tables in references.items()
        for model, table in tables.items()
        if table is not None
    ]
    sound = {split: sound_of(data[split], tables, None) for split, tables in references.items()}
    inputs: dict[tuple[str, int | None], dict[str, Any]] = {}
    rows = []
    for trial, result in done:
        known = data[trial.split]
        sound_range = sound[trial.split]
        if trial.phase == "tune":
            sound_range = goals[trial.split].sound if trial.split in goals else None
        row = trial_row(trial, result, _is_chosen(trial, selected), sound_range)
        values = result_path(folder, trial.key(known)).with_suffix(".parquet")
        if "figures" in result and values.is_file():  # benchmarks/restore.py has the metrics only
            table = pq.read_table(values)
            parts.append(_labelled(table, (trial.method, trial.split, trial.phase, trial.trial, trial.config.seed)))
            place = trial.split, trial.rows
            if place not in inputs:
                tables = cut(known, references[trial.split], trial.rows)
                inputs[place] = {model: aggregate_inputs(each) for model, each in tables.items()}
            if own := aggregate_inputs(table):  # none for images
                aggregates = aggregate_metrics(own, **inputs[place])
                row |= plain({name: value.to_json() for name, value in aggregates.items()})
                overall = aggregates["aggregate"]
                row["aggregate_absent"] = overall.reason if overall.value is None else None
        rows.append(row)
    return rows, parts


def machine() -> str:
    """The driver's machine in words."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{os.cpu_count()} CPUs, {device}, {platform.system()}"


def _reference_metrics(tables: Mapping[str, Any], config: BenchmarkConfig) -> dict[str, Any]:
    """Metrics of the target and the retrained model on all rows."""
    from ofmu_ray.metrics.aggregate import aggregate_inputs, aggregate_metrics
    from ofmu_ray.metrics.summary import summarise

    inputs = {model: aggregate_inputs(table) for model, table in tables.items()}
    samples, retrained = config.base.evaluation.bootstrap_samples, tables["retrained"]
    return {
        model: {
            name: value.to_json()
            for name, value in (
                summarise(table, retrained, bootstrap_samples=samples, seed=config.tuning.seed)
                | aggregate_metrics(inputs[model], **inputs)
            ).items()
        }
        for model, table in tables.items()
        if table is not None
    }


def _place(trial: Trial, config: BenchmarkConfig) -> tuple[int, ...]:
    """Sort key of the tables, independent of the order in which runs finished."""
    labels, phases = [*config.methods, *config.ablation.variants], ["tune", "report", "ablation"]
    split, phase = list(config.splits).index(trial.split), phases.index(trial.phase)
    return split, phase, labels.index(trial.method), trial.trial, trial.config.seed


def _is_chosen(trial: Trial, selected: Mapping[tuple[str, str], ChosenTrial]) -> bool:
    choice = selected.get((trial.split, trial.method))
    return trial.phase == "tune" and choice is not None and choice.trial == trial.trial


def _labelled(table: Any, values: tuple[str, str, str, int | None, int | None]) -> Any:
    """A run's rows with identifying columns in front, and without the generations."""
    import pyarrow as pa

    table = table.drop_columns([name for name in ("generated",) if name in table.column_names])
    kinds = (pa.string(), pa.string(), pa.string(), pa.int32(), pa.int64())
    for place, (name, value, kind) in enumerate(
        zip(("method", "split", "phase", "trial", "seed"), values, kinds, strict=True)
    ):
        table = table.add_column(place, name, pa.array([value] * len(table), kind))
    return table


# ---------------------------------------------------------------------------------------------------------- MLflow


def log_child(
    parent: Any, config: BenchmarkConfig, trial: Trial, result: Mapping[str, Any], marker: Path, *, again: bool
) -> None:
    """Log a run as a child of the benchmark's MLflow run; once (`marker`), unless the run was repeated (`again`).

    If MLflow does not answer, the next start of the benchmark tries again.
    """
    if marker.exists() and not again:
        return
    marker.unlink(missing_ok=True)
    from ofmu_ray import tracking

    options = {"method": trial.method, "split": trial.split, "phase": trial.phase, "trial": trial.trial}
    options |= {"seed": trial.config.seed, "budget": trial.budget, "budget_unit": trial.budget_unit}
    options |= dict(trial.options)
    try:
        handle = tracking.start(
            config.base.tracking,
            config.storage,
            f"{config.name}/{trial.name}",
            options,
            {
                "mlflow.parentRunId": parent.run_id,
                "ofmu.kind": "benchmark_run",
                "ofmu.status": result["status"],
                "ofmu.message": result.get("message", ""),
            },
            record=f"{marker}-id",
        )
    except UserError:
        return
    costs = {name: result[name] for name in COSTS if result.get(name) is not None}
    failed = result["status"] == "failed"
    metrics = {} if failed else {"after": result.get("figures")}
    described = partial(tracking.describe_words, command="ofmu benchmark", commit=None, text=line(config, result))
    status: Any = "FAILED" if failed else "FINISHED"
    if tracking.finish(handle, metrics=metrics, cost=costs, described=described, status=status):
        atomic_write(marker, handle.run_id)


# ---------------------------------------------------------------------------------------------------------- people


def duration(seconds: float) -> str:
    """31 s, 4 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def line(config: BenchmarkConfig, result: Mapping[str, Any]) -> str:
    """A run's values of the rule's two metrics, or why there are none."""
    metrics = result.get("figures") or {}
    shown = [
        f"{name} {value:.3g}"
        for name in (config.rule.objective, config.rule.utility)
        if (value := (metrics.get(name) or {}).get("value")) is not None
    ]
    status = [] if result["status"] == "finished" else [f"{result['status']}: {result.get('message', '')}"]
    return ", ".join([*shown, *status, duration(result.get("total_seconds") or 0.0)])


def table(
    config: BenchmarkConfig, done: Sequence[tuple[Trial, dict[str, Any]]], references: Mapping[str, Mapping[str, Any]]
) -> str:
    """Mean and range over seeds of the rule's metrics, one line per method, with the cost."""
    rule = config.rule
    lines = []
    for split in references:
        lines.append(f"\n{split:24}{rule.objective:>28}{rule.utility:>28}{config.budget.unit:>12}{'seconds':>10}")
        for label in (*config.methods, *config.ablation.variants):
            results = [r for t, r in done if (t.split, t.method) == (split, label) and t.phase != "tune"]
            good = [result for result in results if "figures" in result]
            both = rule.objective, rule.utility
            cells = [_cell(name, [r["figures"][name]["value"] for r in good]) for name in both]
            costs = [r["flops"] if config.budget.unit == "flops" else r["forget_passes"] + r["retain_passes"]
                     for r in good]  # fmt: skip
            seconds = [r["train_seconds"] for r in good]
            ends = f"{_mean(costs):>12.3g}{_mean(seconds):>10.1f}" if good else ""
            lines.append(f"{label:24}{cells[0]:>28}{cells[1]:>28}{ends}")
    geometric = " (of p-values: geometric)" if metric(rule.objective).p_value else ""
    lines.append(f"mean{geometric} [lowest, highest] over seeds {config.seeds}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(name: str, values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    mean = geometric_mean(present) if metric(name).p_value else _mean(present)
    return with_interval({"value": mean, "low": min(present), "high": max(present)})
