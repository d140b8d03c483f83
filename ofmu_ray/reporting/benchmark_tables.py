"""The tables of a benchmark's report; all numbers and marks come from `benchmark_results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics import registry
from ofmu_ray.metrics.fronts import Trial, number_of
from ofmu_ray.metrics.paired import ResampledRun, Verdict, holm, paired_test
from ofmu_ray.metrics.registry import metric
from ofmu_ray.reporting import formats
from ofmu_ray.reporting.benchmark_results import BenchmarkData, SplitResults
from ofmu_ray.reporting.published import PUBLISHED, SOURCE, URL_TEXT
from ofmu_ray.reporting.tables import Cell, Table, cells

MARKS = {"best": "★", "not significantly worse": "≈", "below the utility floor": "▽", "degenerate": "⊘"}
LEGEND = (
    "★ best mean · ≈ not significantly worse than the best (two-sided paired test over rows and seeds, p ≥ 0.05 after "
    "Holm's correction over all pairs of methods of the split) · ▽ misses the utility floor, ⊘ most of its runs answer "
    "forget prompts worse than the retrained model (repetition, empty answers, n-gram variety), so its forgetting is "
    "not ranked · no mark: worse than the best, or not tested"
)
_COSTS = (
    "forget_passes", "retain_passes", "updates", "tokens", "flops", "train_seconds", "total_seconds",
    "peak_memory_bytes",
)  # fmt: skip
_ARROWS = {formats.UP: "↑", formats.DOWN: "↓", formats.MATCH: "→ retrained"}


def heading(name: str, *, retrained: bool = True) -> str:
    """A metric's label with its direction; `retrained`: there is such a model, which some metrics should match."""
    direction = formats.direction(name)
    arrow = "" if direction == formats.MATCH and not retrained else _ARROWS.get(direction, "")
    return f"{formats.label(name)} {arrow}".rstrip()


# --------------------------------------------------------------------------------------------------------- results


def results_table(benchmark: BenchmarkData, results: SplitResults) -> Table:
    """Methods x first metrics and costs, with the retrained model and the target below."""
    first = [*(one.name for one in registry.metrics() if one.first), benchmark.objective, benchmark.utility]
    names = [name for name in dict.fromkeys(first) if name in results.summaries]
    if not results.summaries.get("aggregate"):  # absent from every run; a note says why
        names = [name for name in names if name != "aggregate"]
    rows = []
    for method in results.methods:
        head = Cell(method, _seeds_words(benchmark, results, method))
        shown = [_metric_cell(benchmark, results, name, method) for name in names]
        rows.append([head, *shown, *_cost_cells(results.runs[method])])
    for model in ("retrained", "target"):
        if results.references.get(model):
            shown = [_reference_cell(benchmark, results, name, model) for name in names]
            rows.append([Cell(model, ("reference",)), *shown, *cells("", "", "", "")])
    header = ["Method", *map(heading, names), "Passes", "FLOPs", "Training", "Peak memory"]
    return Table(name="results", caption="", header=header, rows=rows, records=_records(results))


def other_metrics_table(benchmark: BenchmarkData, results: SplitResults) -> Table | None:
    """All other metrics, one per row because there are many."""
    shown = (benchmark.objective, benchmark.utility)
    names = [
        name for name, values in results.summaries.items() if values and name not in shown and not metric(name).first
    ]
    if not names:
        return None
    models = [model for model in ("retrained", "target") if results.references.get(model)]
    rows = [
        [
            Cell(heading(name)),
            *(_metric_cell(benchmark, results, name, method) for method in results.methods),
            *(_reference_cell(benchmark, results, name, model) for model in models),
        ]
        for name in names
    ]
    return Table(
        name="", caption="All other metrics", header=["Metric", *results.methods, *models], rows=rows, folded=True
    )


def _metric_cell(benchmark: BenchmarkData, results: SplitResults, name: str, method: str) -> Cell:
    summary = results.summaries.get(name, {}).get(method)
    if summary is None:
        return Cell("–")
    mean, lines = summary.over_seeds, []
    if metric(name).p_value:
        lines.append("runs " + " · ".join(formats.number(value) for value in summary.values.values()))
    else:
        lines.append("one seed" if mean.low is None else f"seeds {formats.span(mean.value, mean.low, mean.high)}")
        if summary.over_rows is not None:
            lines.append(f"rows {formats.span(mean.value, *summary.over_rows)}")
    if name == benchmark.utility and results.target_utility:
        lines.append(f"{(mean.value or 0.0) / results.target_utility:.3f} of the target's")
    verdict = results.verdicts.get(name, {}).get(method)
    mark = MARKS.get(verdict.result, "") if verdict else ""
    if name == benchmark.utility and method in results.missed:
        mark = f"{mark} ▽".strip()
    best = verdict is not None and verdict.result == "best"
    return Cell(formats.number(mean.value), tuple(lines), mark, strong=best, title=_verdict_words(verdict))


def _verdict_words(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    if verdict.test is None or verdict.p_adjusted is None:
        return verdict.result
    test = verdict.test
    interval = formats.span(test.difference, test.low, test.high)
    return (
        f"{verdict.result}: the best is ahead by {formats.number(test.difference)} ({interval}), "
        f"p = {formats.number(verdict.p_adjusted)} after Holm, over {test.covers}"
    )


def _reference_cell(benchmark: BenchmarkData, results: SplitResults, name: str, model: str) -> Cell:
    draws = results.references[model].get(metric(name).compared)
    resamples = benchmark.resamples(results.split)
    if draws is None:  # not a mean over rows: as it was measured
        measured = benchmark.settings.references.get(results.split, {}).get(model, {}).get(name) or {}
        return Cell(formats.number(measured.get("value")))
    if resamples is None:
        return Cell("–")
    if metric(name).tested_as:  # a p-value, from its distance
        return Cell(formats.number(metrics.exact_ks_p_value(draws.value, len(resamples.sets["forget"].rows))))
    interval = draws.interval()
    same = model == "retrained" and metric(name).paired == "distance"
    return Cell(
        formats.number(draws.value), (f"rows {formats.span(draws.value, *interval)}",) if interval and not same else ()
    )


def _seeds_words(benchmark: BenchmarkData, results: SplitResults, method: str) -> tuple[str, ...]:
    there = {run["seed"] for run in results.runs[method] if number_of(run, benchmark.objective) is not None}
    planned = len(benchmark.settings.seeds) or len(results.runs[method])
    bad = sum(bool(run.get("degenerate")) for run in results.runs[method])
    return (f"{len(there)} of {planned} seeds", *([f"{bad} degenerate"] if bad else []))


def _cost_cells(runs: Sequence[Trial]) -> list[Cell]:
    forget, retain, flops, seconds, memory = (
        _mean(runs, name) for name in ("forget_passes", "retain_passes", "flops", "train_seconds", "peak_memory_bytes")
    )
    passes = None if forget is None or retain is None else forget + retain
    parts = "" if forget is None or retain is None else f"{forget:.4g} forget + {retain:.4g} retain"
    return [
        Cell("–" if passes is None else f"{passes:.5g}", title=parts),
        Cell("–" if flops is None else formats.quantity(flops).replace("FLOP", "")),
        Cell("–" if seconds is None else formats.duration(seconds)),
        Cell("–" if memory is None else formats.byte_size(memory)),
    ]


def _mean(runs: Sequence[Trial], name: str) -> float | None:
    values = [value for run in runs if (value := number_of(run, name)) is not None]
    return float(np.mean(values)) if values else None


def _records(results: SplitResults) -> list[dict[str, Any]]:
    """One record per metric and method."""
    records = []
    for name, methods in results.summaries.items():
        for method, summary in methods.items():
            low, high = summary.over_rows or (None, None)
            verdict = results.verdicts.get(name, {}).get(method)
            record = {
                "split": results.split, "method": method, "figure": name, "mean": summary.over_seeds.value,
                "seeds_low": summary.over_seeds.low, "seeds_high": summary.over_seeds.high, "rows_low": low,
                "rows_high": high, "seeds": len(summary.values), "result": verdict.result if verdict else None,
            }  # fmt: skip
            records.append(record | _test_record(verdict))
    return records


def _test_record(verdict: Verdict | None) -> dict[str, Any]:
    test = verdict.test if verdict else None
    return {
        "best_ahead_by": test.difference if test else None,
        "best_ahead_low": test.low if test else None,
        "best_ahead_high": test.high if test else None,
        "p_value": test.p_value if test else None,
        "p_holm": verdict.p_adjusted if verdict else None,
        "test_covers": test.covers if test else None,
    }


def tests_table(benchmark: BenchmarkData, results: SplitResults) -> Table | None:
    """The tests behind the marks of the rule's two metrics."""
    rows = []
    for name in dict.fromkeys((benchmark.objective, benchmark.utility)):
        for method, verdict in results.verdicts.get(name, {}).items():
            test, p_value = verdict.test, verdict.p_adjusted
            rows.append(
                cells(
                    formats.label(metric(name).compared), method, verdict.result,
                    "–" if test is None else formats.number(test.difference),
                    "–" if test is None else formats.span(test.difference, test.low, test.high),
                    "–" if test is None or test.p_value is None else formats.number(test.p_value),
                    "–" if p_value is None else formats.number(p_value),
                    "–" if test is None else test.covers,
                )
            )  # fmt: skip
    header = ["Metric", "Method", "Result", "Best is ahead by", "95 % interval", "p", "p after Holm", "Covers"]
    caption = "The paired tests behind the marks"
    return Table(name="", caption=caption, header=header, rows=rows, words=3, folded=True) if rows else None


# ----------------------------------------------------------------------------------------- ablation, published rows


def ablation_table(benchmark: BenchmarkData, split: str) -> Table | None:
    """Variants of a method against the method: paired differences in forgetting and utility."""
    reference = benchmark.settings.ablation_of
    trials = [trial for trial in benchmark.trials if (trial["split"], trial["phase"]) == (split, "ablation")]
    variants = [name for name in dict.fromkeys(trial["method"] for trial in trials) if name != reference]
    if not variants or reference is None:
        return None
    goal = metric(benchmark.objective).compared
    columns: dict[str, dict[str, Cell]] = {}
    records: dict[str, dict[str, Any]] = {name: {"split": split, "variant": name, "of": reference} for name in variants}
    for name in (goal, benchmark.utility):
        scores = {label: benchmark.scores(split, label, name, "report", "ablation") for label in (reference, *variants)}
        columns[name] = _differences(name, scores, reference, records)
    rows = []
    for label in (reference, *variants):
        runs = benchmark.runs(split, label, "report", "ablation")
        lines = ("reference",) if label == reference else ()
        shown = [columns[name].get(label, Cell("–")) for name in (goal, benchmark.utility)]
        means = [formats.number(_mean(runs, name)) for name in (goal, benchmark.utility)]
        rows.append(cells(Cell(label, lines), means[0], shown[0], means[1], shown[1], *_cost_cells(runs)[:3]))
    header = ["Variant", heading(goal), "Forgetting, difference", heading(benchmark.utility), "Utility, difference",
              "Passes", "FLOPs", "Training"]  # fmt: skip
    caption = (
        f"Variants of {reference} with its chosen options, not tuned again. Differences are variant minus {reference}, "
        "with the sign turned so that positive is better, and 95 % intervals over rows and seeds; + better, − worse at "
        "p < 0.05 after Holm's correction over the variants."
    )
    return Table(name="ablation", caption=caption, header=header, rows=rows, records=list(records.values()))


def _differences(
    name: str, scores: Mapping[str, Mapping[int, ResampledRun]], reference: str, records: Mapping[str, dict[str, Any]]
) -> dict[str, Cell]:
    """Variant -> its difference to the reference; also adds the difference to the variant's record."""
    tests = {label: paired_test(scores[label], scores[reference]) for label in records}
    p_values = {label: test.p_value for label, test in tests.items() if test is not None and test.p_value is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    cells_of = {}
    for label, test in tests.items():
        if test is None:
            continue
        p_value = adjusted.get(label)
        mark = "" if p_value is None or p_value >= 0.05 else "+" if test.difference > 0 else "−"
        words = "" if p_value is None else f"p = {formats.number(p_value)}"
        lines = tuple(
            line for line in (formats.span(test.difference, test.low, test.high), words) if line not in ("", "–")
        )
        sign = "+" if test.difference >= 0 else ""
        cells_of[label] = Cell(f"{sign}{formats.number(test.difference)}", lines, mark, title=f"over {test.covers}")
        records[label].update(
            {
                f"{name}_better_by": test.difference, f"{name}_low": test.low, f"{name}_high": test.high,
                f"{name}_p_value": test.p_value, f"{name}_p_holm": p_value, f"{name}_covers": test.covers,
            }
        )  # fmt: skip
    return cells_of


def published_table(benchmark: BenchmarkData, results: SplitResults) -> Table | None:
    """The paper's numbers next to ours, if it reports this split."""
    if results.split not in PUBLISHED:
        return None
    setting, published = PUBLISHED[results.split]
    names = list(published[0].values)
    rows, records = [], []
    for row in published:
        ours = [label for label in row.labels if label in results.methods or results.references.get(label)]
        shown = [" · ".join(_own(benchmark, results, name, label) for label in ours) or "–" for name in names]
        rows.append(
            cells(row.name, ", ".join(ours) or "–", *(formats.number(row.values[name]) for name in names), *shown)
        )
        records.append({"split": results.split, "source": SOURCE, "setting": setting, "name": row.name, **row.values})
    labels = [formats.label(name) for name in names]
    header = [
        "Published",
        "Here",
        *(f"{label}, published" for label in labels),
        *(f"{label}, here" for label in labels),
    ]
    caption = (
        f"{setting}, as published ({SOURCE}, {URL_TEXT}): a different model and protocol, and single numbers without "
        "an interval. They are here for orientation only and enter no ranking or test."
    )
    return Table(name="published", caption=caption, header=header, rows=rows, words=2, records=records)


def _own(benchmark: BenchmarkData, results: SplitResults, name: str, label: str) -> str:
    if label in results.references:
        return _reference_cell(benchmark, results, name, label).text
    summary = results.summaries.get(name, {}).get(label)
    return "–" if summary is None else formats.number(summary.over_seeds.value)
