"""The report of `ofmu sweep`: the recommendation, its certainty and its basis. MLflow compares trials in detail."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ofmu_ray.attacks.importance import MINIMUM_TRIALS, RELIABLE_ORDER
from ofmu_ray.config.overrides import nested
from ofmu_ray.metrics import degeneration
from ofmu_ray.metrics.fronts import number_of
from ofmu_ray.metrics.registry import metric
from ofmu_ray.reporting import formats
from ofmu_ray.reporting import sweep_tables as tables
from ofmu_ray.reporting.benchmark_settings import facts
from ofmu_ray.reporting.marks import Plot, standalone_svg
from ofmu_ray.reporting.page import yaml_text
from ofmu_ray.reporting.sections import Head, Section, html_page, markdown_page, some
from ofmu_ray.reporting.sweep_plots import front_plot, history_plot
from ofmu_ray.reporting.sweep_results import SweepData, noun, options
from ofmu_ray.reporting.tables import csv_text
from ofmu_ray.storage import atomic_write


def write_sweep_report(
    folder: str | Path,
    trials: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> list[Path]:
    """Write report.html, report.md, trials.csv and, if there is something to draw, plane.svg; return their paths.

    `trials`, `stages` and `settings` come from `search/sweep_output.py`, as in trials.parquet and sweep.json. Trials
    of phase confirm have the chosen options, a fresh seed and all rows.
    """
    sweep = SweepData(trials, stages, settings)
    plane, head = front_plot(sweep), _head(sweep)
    failures = Section("Trials that did not finish as planned", _failures(sweep))
    sections = [_recommendation(sweep), _certainty(sweep), _best(sweep, plane), _options(sweep), failures]
    sections = [one for one in sections if one.lead or one.notes or one.tables]
    title, command = str(settings.get("name") or "sweep"), shlex.join(settings.get("command") or ())
    texts = {
        "report.html": html_page("sweep", title, head, command, sections),
        "report.md": markdown_page(title, head, command, sections),
        "trials.csv": csv_text(tables.records(sweep)),
        **({} if plane is None else {"plane.svg": standalone_svg(plane)}),
    }
    for name, text in texts.items():
        atomic_write(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]


def _head(sweep: SweepData) -> Head:
    settings, (spent, saved) = sweep.settings, sweep.flops()
    share = f", {saved / (spent + saved):.0%} saved by stopping trials early" if saved else ""
    facts_shown = {
        "method": settings.get("method"),
        "trials": f"{len(sweep.trials)}, {len(sweep.completed)} completed" if sweep.trials else "none yet",
        "fresh seeds": str(len(sweep.fresh)) if sweep.fresh else None,
        "spent": formats.quantity(spent, "FLOP") + share if spent else None,
        "wall clock": formats.duration(settings["seconds"]) if settings.get("seconds") else None,
        **facts(settings, (settings.get("config") or {}).get("base") or {}),
    }
    status = f"recommended: trial {sweep.recommended['number']}" if sweep.recommended else "nothing to recommend"
    return Head(
        status, sweep.recommended is not None, {name: str(words) for name, words in facts_shown.items() if words}
    )


def _recommendation(sweep: SweepData) -> Section:
    trial, chosen = sweep.recommended, sweep.chosen
    if trial is None or chosen is None:
        return Section("What to do", lead=_nothing(sweep))
    objective, utility, above = noun(sweep.objective), noun(sweep.utility), len(sweep.enough)
    if sweep.floor is None:
        why = f"it has the best {objective} of all trials"
    elif above == 1:
        why = f"it is the only one with a {utility} of at least {_least(sweep)}"
    else:
        why = f"it has the best {objective} among the {above} trials whose {utility} is at least {_least(sweep)}"
    lead = [f"Take trial {trial['number']}: {why}."]
    if chosen.get("model"):
        lead.append(f"Its model is in {chosen['model']}. To train it again, on this or other data:")
    else:
        lead.append("Its model was not kept (keep_models). To train it again:")
    config = chosen.get("config_file") or "best.yaml"
    changes = yaml_text(nested(chosen.get("options") or options(trial)))
    code = [f"ofmu unlearn --config {config}", f"# what {config} sets besides the sweep's base\n{changes}"]
    return Section("What to do", lead=lead, code=code, more=some(tables.metrics_table(sweep)))


def _nothing(sweep: SweepData) -> list[str]:
    utility, nearest = noun(sweep.utility), sweep.nearest
    widen = "extend the space to smaller learning rates or fewer rounds"
    if nearest is not None and sweep.goal.degenerate(nearest):
        return [
            f"All completed trials are degenerate; trial {nearest['number']} is first in the rule's "
            f"order ({degeneration.words(nearest, sweep.goal.sound)}). Nothing is recommended: {widen}."
        ]
    if nearest is not None:
        return [
            f"No trial meets the floor: the {utility} must be at least {_floor(sweep)}, and the nearest trial, "
            f"{nearest['number']}, has {formats.number(number_of(nearest, sweep.utility))}. Nothing is recommended: "
            f"lower select.utility_floor, {widen}, or run more trials."
        ]
    if sweep.completed:
        return ["No trial is chosen yet."]
    if not sweep.trials:
        return ["No trial has finished yet: there is nothing to recommend."]
    failed = sum(trial.get("status") == "failed" for trial in sweep.trials)
    return [
        f"No trial completed with both {noun(sweep.objective)} and {utility}: there is nothing to recommend. "
        f"{failed} of {len(sweep.trials)} trials failed; the reasons are below."
    ]


def _floor(sweep: SweepData, margin: float = 0.0) -> str:
    share, base = sweep.rule.get("utility_floor"), sweep.rule.get("relative_to") or "target"
    of = [] if share is None else [f"{share:g} × the {base}{' model' if base == 'retrained' else ''}'s"]
    of += [f"plus the margin of {formats.number(margin)}"] * bool(margin)
    return formats.number((sweep.floor or 0.0) + margin) + (f" ({', '.join(of)})" if of else "")


def _least(sweep: SweepData) -> str:
    """The utility that the choice needed: the floor, with the margin if a trial reached that."""
    return _floor(sweep, (sweep.choosing.floor or 0.0) - (sweep.floor or 0.0))


def _certainty(sweep: SweepData) -> Section:
    trial, objective = sweep.recommended, noun(sweep.objective)
    if trial is None:
        return Section("How sure")
    notes = [
        f"The chosen trial is the best of {len(sweep.enough)}, so the value it was chosen by is optimistic, more "
        "so with more trials. Its interval covers rows only and does not correct for this; "
        f"{tables.judged_on(sweep)}."
        if len(sweep.enough) > 1
        else f"There was no other trial to choose; {tables.judged_on(sweep)}, and its interval covers rows only."
    ]
    if trial.get("status") != "finished":
        notes.append(f"Its run ended before its last round: {trial.get('message') or trial.get('status')}.")
    if metric(sweep.objective).p_value and sweep.search.get("rows") is not None:
        notes.append(
            f"The {objective} is a p-value: the same difference to the retrained model gives a smaller one on more "
            "rows. Values on all rows are not comparable with those as judged; KS distances are."
        )
    good = [one for one in sweep.fresh if number_of(one, sweep.objective) is not None]
    missed = ", ".join(str(one.get("seed")) for one in good if sweep.goal.enough(one) is False)
    if good:
        cell = tables.fresh_cell(sweep.fresh, sweep.objective)
        notes.append(
            f"Its options ran again with fresh seeds, free of selection bias: {objective} {cell.text} "
            f"({'; '.join(cell.lines)}). Trust these runs."
        )
    else:
        notes.append(
            "All its runs on fresh seeds failed, for the reasons below: no value is free of selection bias."
            if sweep.fresh
            else "It was not run again with a fresh seed: set select.seeds for values free of selection bias."
        )
    if missed:
        notes.append(f"Below the utility floor of {_floor(sweep)}: seed {missed}.")
    rivals = ", ".join(str(one["number"]) for one in sweep.enough if one is not trial and sweep.spans(one, trial))
    if rivals:
        notes.append(
            f"Trials with enough utility that {objective} cannot distinguish from it (their intervals include its "
            f"value): {rivals}."
        )
    value, low, high = (number_of(trial, f"{sweep.utility}{end}") for end in ("", "_low", "_high"))
    if sweep.floor is not None and low is not None and low < sweep.floor:
        notes.append(
            f"The interval of its {noun(sweep.utility)} ({formats.span(value, low, high)}) reaches below the floor "
            f"of {formats.number(sweep.floor)}: on other rows the trial may miss the floor."
        )
    return Section("How sure", lead=notes)


def _best(sweep: SweepData, plane: Plot | None) -> Section:
    if plane is None:
        return Section("The best trials", ["No trial has been evaluated yet."] if sweep.trials else ())
    notes = [
        "In the order of the rule, then the fresh seeds, evaluated on all rows. All trials are in trials.csv. For "
        "details, select this sweep's trials in MLflow and compare them.",
        "Plot: up and to the right is better; line: the Pareto front of the completed trials, with their numbers; ★ "
        "retrained model, ✖ target.",
    ]
    return Section("The best trials", notes, some(tables.best_table(sweep)), plots=[plane])


def _failures(sweep: SweepData) -> list[str]:
    """Trials that neither finished nor were stopped by the scheduler, with the reason."""
    lines = []
    for trial in sweep.all:
        if trial.get("status") not in ("finished", "stopped"):
            seed = f", seed {trial.get('seed')}" if trial.get("phase") == "confirm" else ""
            lines.append(f"Trial {trial['number']}{seed}: {trial.get('message') or trial.get('status')}.")
    return lines


def _options(sweep: SweepData) -> Section:
    """How the space was searched, and which options mattered."""
    search, count, plot = sweep.search, len(sweep.completed), history_plot(sweep)
    early = (search.get("early") or {}).get("kind", "none")
    notes = [
        f"{len(sweep.trials)} of {search.get('trials')} trials; search: {search.get('kind')}, seed "
        f"{search.get('seed')}; early stopping: {early}; {tables.judged_on(sweep)}."
    ]
    if sweep.importances:
        notes.append(
            f"Shares: PED-ANOVA over the {count} completed trials: how far an option's values in the better half "
            "differ from those in all, with 95 % bootstrap intervals over trials; p: how often shuffled outcomes make "
            "any option look as important."
            + (" With so few trials only the first place is fairly reliable." if count < RELIABLE_ORDER else "")
        )
    elif count < MINIMUM_TRIALS:
        notes.append(f"{count} completed trials; importances mean nothing below {MINIMUM_TRIALS}.")
    table = some(tables.options_table(sweep))
    notes.append(
        "Rank: Spearman's correlation; it sees monotonic trends only, and few trials give large ones by chance."
    )
    if plot is not None:
        notes.append(
            "Plot: line: the best that the rule could choose so far; grey: trials it could not choose. If the line "
            "still moves at its end, more trials might help."
        )
    return Section("What was searched, and what mattered", notes if table else (), table, plots=[plot] if plot else [])
