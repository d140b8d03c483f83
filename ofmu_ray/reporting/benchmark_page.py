"""The report of `ofmu benchmark`: one HTML page, the same text as Markdown, and the tables as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.metrics.fronts import Trial, hypervolume, number_of, pareto_front, sensitivity
from ofmu_ray.metrics.registry import Metric, metric
from ofmu_ray.reporting import benchmark_runs, formats
from ofmu_ray.reporting import benchmark_tables as tables
from ofmu_ray.reporting.benchmark_plots import Point, cost_plot, plane, sensitivity_plot
from ofmu_ray.reporting.benchmark_results import BenchmarkData, SplitResults, split_results
from ofmu_ray.reporting.benchmark_settings import BenchmarkSettings
from ofmu_ray.reporting.sections import Head, Section, all_tables, html_page, markdown_page, some
from ofmu_ray.reporting.tables import Table, cells, csv_text
from ofmu_ray.storage import atomic_write


def write_benchmark_report(
    folder: str | Path,
    trials: pa.Table | Sequence[Mapping[str, Any]],
    rows: pa.Table | Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> list[Path]:
    """Write report.html, report.md and the tables as CSV into the folder; return their paths.

    Works for an unfinished benchmark too: the report then shows the runs that are done.

    Args:
        trials: one row per run: `method`, `split`, `phase` (tune, report, ablation), `trial`, `seed`, `status`,
            `message`, `selected`, `options` (JSON text), `budget_unit`, `budget`, costs as in metrics.json's `cost`,
            and metrics as columns NAME, NAME_low, NAME_high.
        rows: per-row values of the runs (`method`, `split`, `phase`, `seed`, `set`, `index`, `cluster` and the columns
            of rows.parquet). Rows of the reference models have `target` or `retrained` as `method`.
        settings: see `BenchmarkSettings.of`.
    """
    benchmark = BenchmarkData(trials, rows, BenchmarkSettings.of(settings))
    sections = _sections(benchmark)
    head = _head(benchmark)
    title, command = benchmark.settings.title, benchmark.settings.command
    texts = {
        "report.html": html_page("benchmark", title, head, command, sections),
        "report.md": markdown_page(title, head, command, sections),
    }
    records: dict[str, list[Mapping[str, Any]]] = {"trials": list(benchmark.trials)}
    for table in all_tables(sections):
        if table.name:
            records.setdefault(table.name, []).extend(table.records)
    texts |= {f"{name}.csv": csv_text(rows_of_table) for name, rows_of_table in records.items()}
    paths = [Path(folder) / name for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        atomic_write(path, text)
    return paths


# ------------------------------------------------------------------------------------------------------ the content


def _head(benchmark: BenchmarkData) -> Head:
    settings, trials = benchmark.settings, benchmark.trials
    planned = settings.planned_runs or len(trials)
    units = {(str(trial.get("budget_unit")), number_of(trial, "budget")) for trial in trials}
    budgets = sorted({(unit, amount) for unit, amount in units if amount is not None})
    per_run = ", ".join(
        f"{formats.quantity(amount)}{'' if unit == 'flops' else ' '}{_unit(unit)}" for unit, amount in budgets
    )
    facts = {
        "runs": f"{len(trials)} of {planned}",
        "methods": str(len({trial["method"] for trial in trials if trial["phase"] != "ablation"})),
        "splits": ", ".join(benchmark.splits),
        "draws of a method": _draws(settings),
        "seeds": ", ".join(map(str, settings.seeds)) or "–",
        "budget of a run": per_run,
        **settings.facts,
    }
    utility, objective = (formats.label(name).lower() for name in (benchmark.utility, benchmark.objective))
    rule = (
        f"The rule: consider a method's tuning trials with at least {benchmark.floor + settings.margin:g} × the "
        f"target's {utility}{f' ({benchmark.floor:g} if none has that)' if settings.margin else ''} whose answers to "
        f"forget prompts are not degenerate, and choose the one with the best {objective} ({_aim(benchmark)}). Ties go "
        "to higher utility, then to lower cost. The chosen options run again with fresh seeds, and only these runs are "
        "summarised and compared. The plots, the lists of runs and trials.csv show all runs."
    )
    reading = (
        "Intervals are 95 %: over seeds by Student's t, over rows by the bootstrap at these seeds (resampling clusters "
        "if rows have them)."
    )
    declared = metric(benchmark.objective)
    if declared.p_value:
        reading += (
            f" {declared.label} is a p-value: tables show its geometric mean over seeds and each run's value; tests "
            f"use the {metric(declared.compared).noun} behind it instead."
        )
    done = len(trials) >= planned
    status = "complete" if done else f"{len(trials)} of {planned} runs"
    return Head(status, done, {name: words for name, words in facts.items() if words}, [rule, reading])


def _aim(benchmark: BenchmarkData) -> str:
    """Which way the objective is better."""
    one = metric(benchmark.objective)
    words = {"high": "high", "low": "low", "zero": "near 0", "retrained": "near the retrained model's"}
    return words[one.better if benchmark.has_retrained else one.alone or one.better]


def _draws(settings: BenchmarkSettings) -> str:
    if not settings.refine or settings.draws is None:
        return "" if settings.draws is None else str(settings.draws)
    return f"{settings.draws}, then {settings.refine} around the best of them"


def _unit(unit: str) -> str:
    return "FLOP" if unit == "flops" else unit


def _sections(benchmark: BenchmarkData) -> list[Section]:
    sections: list[Section] = []
    for split in benchmark.splits:
        results = split_results(benchmark, split)
        sections += [_results(benchmark, results), _plane(benchmark, results), _cost(benchmark, results)]
        sections += [_choice(benchmark, split), _ablation(benchmark, split), _published(benchmark, results)]
    failures = benchmark_runs.failures_table(benchmark)
    count = len(failures.rows) if failures else 0
    notes = [] if failures else ["Every run so far finished as planned."]
    sections.append(
        Section("Runs that did not finish as planned" + (f": {count}" if count else ""), notes, some(failures))
    )
    return [section for section in sections if section.notes or section.tables or section.plots]


def _results(benchmark: BenchmarkData, results: SplitResults) -> Section:
    notes = [f"Recorded values that differ from those computed from the rows: {words}." for words in results.mismatches]
    if results.target_utility is None:
        notes.append("The target's rows are missing: no run can be compared with the utility floor.")
    if not any(results.runs.values()):
        notes.append("No reported run is done yet.")
        return Section(results.split, notes, more=[benchmark_runs.runs_table(benchmark, results.split)])
    if any(results.verdicts.values()):
        notes.append(tables.LEGEND)
    absent = {
        str(run["aggregate_absent"]) for runs in results.runs.values() for run in runs if run.get("aggregate_absent")
    }
    notes += [f"No aggregate of OpenUnlearning: {reason}." for reason in sorted(absent)]
    more = [tables.tests_table(benchmark, results), tables.other_metrics_table(benchmark, results)]
    return Section(
        results.split, notes, [tables.results_table(benchmark, results)],
        more=some(*more, benchmark_runs.runs_table(benchmark, results.split)),
    )  # fmt: skip


def _plane(benchmark: BenchmarkData, results: SplitResults) -> Section:
    """Every trial in the plane, each method's Pareto front, and how much of the plane it covers."""
    split, title, scored = results.split, f"Forgetting and utility, {results.split}", benchmark.scored
    if scored is None:
        return Section(title, level=3)
    scale = {phase: benchmark.target_utility(split, phase) for phase in ("tune", "report")}
    relative = all(scale.values())
    ideal = _reference(benchmark, results, "retrained", scored.name)
    points = {
        method: _points(benchmark, scored, ideal, split, method, scale if relative else {})
        for method in results.methods
    }
    points = {method: runs for method, runs in points.items() if runs}
    if not points:
        return Section(title, level=3)
    references = {}
    for model in results.references:
        utility = _reference(benchmark, results, model, benchmark.utility)
        y = scored.score(_reference(benchmark, results, model, scored.name), ideal)
        if utility is not None and y is not None:
            x = utility / ((results.target_utility if relative else None) or 1.0)
            references[model] = Point(x, y, f"{model}: utility {x:.3f}, {scored.score_words} {y:.3f}")
    label = metric(benchmark.utility).noun
    x_label = f"{label} / the target's" if relative else label
    floor = benchmark.floor if relative else None
    utility_of_1 = (scale["report"] or 1.0) if relative else 1.0
    table = _areas(split, points, floor, references.get("target"), utility_of_1, scored.score_words)
    notes = [
        "Up and to the right is better. Solid: reported runs; faint: tuning trials, which may be judged on fewer rows. "
        "Hollow: degenerate runs. Lines: each method's Pareto front over all but these. Hover over a point for its run."
    ]
    return Section(
        title,
        notes,
        plots=[plane(title, points, references, floor, x_label, scored.score_words)],
        more=[table],
        level=3,
    )


def _reference(benchmark: BenchmarkData, results: SplitResults, model: str, name: str) -> float | None:
    """A metric of the target or the retrained model, from its rows, or else as it was recorded; None: it has none."""
    computed = results.references.get(model, {}).get(name)
    if computed is not None:
        return computed.value
    return number_of(benchmark.settings.references.get(results.split, {}).get(model, {}).get(name) or {}, "value")


def _points(
    benchmark: BenchmarkData,
    scored: Metric,
    ideal: float | None,
    split: str,
    method: str,
    scale: Mapping[str, float | None],
) -> list[Point]:
    points = []
    for run in benchmark.runs(split, method, "tune", "report"):
        score, utility = scored.score(number_of(run, scored.name), ideal), number_of(run, benchmark.utility)
        if score is not None and utility is not None:
            x = utility / (scale.get(run["phase"]) or 1.0)
            words = _hover(run, x, f"{scored.score_words} {score:.3f}", benchmark.objective)
            points.append(Point(x, score, words, run["phase"] == "report", bool(run.get("degenerate"))))
    return points


def _hover(run: Trial, x: float, score: str, objective: str) -> str:
    which = f"trial {run.get('trial')}" if run["phase"] == "tune" else f"seed {run.get('seed')}"
    value = number_of(run, objective) if metric(objective).p_value else None
    logarithm = "" if not value else f", log10 of {metric(objective).noun} {np.log10(value):.2f}"
    bad = f", degenerate ({run.get('degenerate_by')})" if run.get("degenerate") else ""
    return f"{run['method']}, {run['phase']} {which}: utility {x:.3f}, {score}{logarithm}{bad}"


def _areas(
    split: str,
    points: Mapping[str, Sequence[Point]],
    floor: float | None,
    target: Point | None,
    scale: float,
    score: str,
) -> Table:
    """Hypervolume of each method's front: from the origin, and from the utility floor and the target's score.

    `scale`: model utility where x is 1.
    """
    corner = None if floor is None or target is None else (floor, target.y)
    rows, records = [], []
    for method, runs in points.items():
        everything = [(run.x, run.y) for run in runs]
        sound = [(run.x, run.y) for run in runs if not run.degenerate]
        front = pareto_front(sound)
        areas = {
            "hypervolume": hypervolume(sound, (0.0, 0.0)),
            "hypervolume_all_runs": hypervolume(everything, (0.0, 0.0)),
            "hypervolume_above_target": None if corner is None else hypervolume(sound, corner),
        }
        above = areas["hypervolume_above_target"]
        rows.append(
            cells(
                method, f"{len(runs)}", f"{len(runs) - len(sound)}", f"{len(front)}",
                formats.number(areas["hypervolume"]), formats.number(areas["hypervolume_all_runs"]),
                "–" if above is None else f"{above:.4f}",
            )
        )  # fmt: skip
        records.append(
            {"split": split, "method": method, "runs": len(runs), "degenerate": len(runs) - len(sound),
             "front": len(front), **areas, "corner_utility": corner and corner[0],
             "corner_score": corner and corner[1], "utility_of_1": scale}
        )  # fmt: skip
    above_words = (
        "" if corner is None else f" and from ({corner[0]:g}, {corner[1]:.3f}), the floor and the target's score"
    )
    caption = (
        f"Area of this plane, {score} against utility, that a method's front dominates, from the origin"
        f"{above_words}. Only the column for all runs counts degenerate ones. Noise and more runs can only make the "
        "area larger: compare methods with equally many runs."
    )
    header = ["Method", "Runs", "Degenerate", "On the front", "Hypervolume", "All runs", "Above floor and target"]
    return Table(name="hypervolume", caption=caption, header=header, rows=rows, records=records)


def _cost(benchmark: BenchmarkData, results: SplitResults) -> Section:
    """What the reported runs cost, against what they reached."""
    title, scored = f"Cost and quality, {results.split}", benchmark.scored
    if scored is None:
        return Section(title, level=3)
    ideal = _reference(benchmark, results, "retrained", scored.name)
    points: dict[str, list[Point]] = {}
    for method, runs in results.runs.items():
        for run in runs:
            seconds = number_of(run, "train_seconds")
            score = scored.score(number_of(run, scored.name), ideal)
            if seconds is not None and score is not None:
                time, reached = formats.duration(seconds), f"{scored.score_words} {score:.3f}"
                words = f"{method}, seed {run.get('seed')}: {time}, {reached}"
                points.setdefault(method, []).append(Point(seconds, score, words))
    # the same place in the legend and the same colour as in the plane
    ordered = {method: points.get(method, []) for method in results.methods}
    if not points:
        return Section(title, level=3)
    used = [share for runs in results.runs.values() for run in runs if (share := _share(run)) is not None]
    notes = [f"Reported runs used {min(used):.1%} to {max(used):.1%} of the budget."] if used else []
    return Section(title, notes, plots=[cost_plot(title, ordered, "seconds of training", scored.score_words)], level=3)


def _share(run: Trial) -> float | None:
    used = number_of(run, "flops") if run.get("budget_unit") == "flops" else benchmark_runs.passes(run)
    budget = number_of(run, "budget")
    return None if used is None or not budget else used / budget


def _choice(benchmark: BenchmarkData, split: str) -> Section:
    """Chosen options, and how the outcome varied with each tuned option."""
    table, notes = benchmark_runs.selected_table(benchmark, split)
    panels, rows, records = [], [], []
    objective, utility = formats.label(benchmark.objective).lower(), metric(benchmark.utility).noun
    for method in benchmark.methods(split):
        for entry in sensitivity(benchmark.runs(split, method, "tune"), benchmark.objective, benchmark.utility):
            panels.append(sensitivity_plot(f"{method}: {entry.option}", entry, objective, utility))
            correlations = entry.objective_correlation, entry.utility_correlation
            words = ["–" if value is None else f"{value:+.2f}" for value in correlations]
            rows.append(cells(method, entry.option, str(len(entry.values)), *words))
            records.append(
                {"split": split, "method": method, "option": entry.option, "trials": len(entry.values),
                 f"spearman_{benchmark.objective}": correlations[0], f"spearman_{benchmark.utility}": correlations[1]}
            )  # fmt: skip
    caption = (
        "Spearman's rank correlation of each tuned option with the outcome over the tuning trials. All options of a "
        "trial are drawn together, so another option may cause a correlation, and few trials give large ones by chance."
    )
    header = ["Method", "Option", "Trials", f"With {objective}", f"With {utility}"]
    trials_table = Table(name="sensitivity", caption=caption, header=header, rows=rows, words=2, records=records)
    return Section(
        f"Choice and sensitivity, {split}", notes, some(table), more=some(trials_table), panels=panels,
        fold="The trials behind the correlations", level=3,
    )  # fmt: skip


def _ablation(benchmark: BenchmarkData, split: str) -> Section:
    return Section(f"Ablation, {split}", tables=some(tables.ablation_table(benchmark, split)), level=3)


def _published(benchmark: BenchmarkData, results: SplitResults) -> Section:
    return Section(
        f"Published numbers, {results.split}", tables=some(tables.published_table(benchmark, results)), level=3
    )
