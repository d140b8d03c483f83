"""The report of `ofmu sweep`: one page, the same as Markdown, all trials as CSV, and its plots as single files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ofmu_ray.attacks.importance import MINIMUM_TRIALS, RELIABLE_ORDER
from ofmu_ray.metrics import degeneration
from ofmu_ray.metrics.fronts import Trial, number_of
from ofmu_ray.reporting import figures
from ofmu_ray.reporting import sweep_tables as tables
from ofmu_ray.reporting.benchmark_settings import facts
from ofmu_ray.reporting.benchmark_tables import span
from ofmu_ray.reporting.marks import Plot, standalone_svg
from ofmu_ray.reporting.page import yaml_text
from ofmu_ray.reporting.sections import Head, Section, Tile, html_page, markdown_page, some
from ofmu_ray.reporting.sweep_figures import importance_figure, parallel_figure, plane_figure, progress_figures
from ofmu_ray.reporting.sweep_results import Sweep, noun, options
from ofmu_ray.reporting.tables import csv_text
from ofmu_ray.storage import atomic_write


def write_sweep_report(
    folder: str | Path,
    trials: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> list[Path]:
    """Writes report.html, report.md, trials.csv and, where there is something to draw, plane.svg, parallel.svg and
    importance.svg into the folder; returns their paths.

    Args:
        trials: one mapping per run: `number`, `phase` (search; confirm: the chosen options on a fresh seed and all
            rows), `seed`, `status`, `message`, `options` (JSON text), `stage` of `stages` evaluations, costs as in
            metrics.json's `cost`, `ended_seconds` since the sweep began, `selected`, `feasible`, `front`, `parent`,
            and figures as NAME, NAME_low, NAME_high.
        stages: one mapping per evaluation on the way: `number`, `stage`, `flops`, `train_seconds`, the rule's figures.
        settings: `name`, `command`, `config`, `method`, `machine`, `code`, `packages`, `seconds`, `rule`, `search`,
            `space`, `references` and `chosen` or `nearest`, as in sweep.json.
    """
    sweep = Sweep(trials, stages, settings)
    plots = {"plane": plane_figure(sweep), "parallel": parallel_figure(sweep), "importance": importance_figure(sweep)}
    sections, head = _sections(sweep, plots), _head(sweep)
    title, command = str(settings.get("name") or "sweep"), _command(settings)
    texts = {
        "report.html": html_page("sweep", title, head, command, sections, _tiles(sweep)),
        "report.md": markdown_page(title, head, command, sections),
        "trials.csv": csv_text(tables.records(sweep)),
        **{f"{name}.svg": standalone_svg(plot) for name, plot in plots.items() if plot is not None},
    }
    for name, text in texts.items():
        atomic_write(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]


def _command(settings: Mapping[str, Any]) -> str:
    command = settings.get("command") or ""
    return command if isinstance(command, str) else shlex.join(command)


def _head(sweep: Sweep) -> Head:
    settings, spent = sweep.settings, sweep.spent(sweep.all)
    config = settings.get("config") or {}
    found = {
        "method": settings.get("method"),
        "trials": f"{len(sweep.trials)}, {len(sweep.whole)} to their end" if sweep.trials else "none yet",
        "fresh seeds": str(len(sweep.fresh)) if sweep.fresh else None,
        "spent": figures.quantity(spent.flops, "FLOP") if spent.flops else None,
        "wall clock": figures.duration(settings["seconds"]) if settings.get("seconds") else None,
        **facts(settings, config.get("base") or {}),
    }
    status = f"recommended: trial {sweep.recommended['number']}" if sweep.recommended else "nothing to recommend"
    return Head(status, sweep.recommended is not None, {name: str(words) for name, words in found.items() if words})


def _tiles(sweep: Sweep) -> list[Tile]:
    """The recommended trial's two figures beside the target's on the same rows, and what its run costs."""
    trial = sweep.recommended
    if trial is None or sweep.chosen is None:
        return []
    whole, tiles = sweep.chosen.get("figures") or {}, []
    for name in (sweep.objective, sweep.utility):
        interval = span(*(number_of(trial, f"{name}_{end}") for end in ("low", "high")))
        words = [f"95 % {interval}"] if interval != "–" else []
        if sweep.search.get("rows") is not None:
            words.append(f"on {sweep.search['rows']} rows of each set")
            everything = figures.cell(whole.get(name))
            words += [f"on all rows {everything.text}"] * (everything.value is not None)
        before = sweep.reference("target", name)
        was = "" if before is None else figures.number(before)
        tiles.append(Tile(figures.label(name), figures.number(number_of(trial, name)), "; ".join(words), was))
    flops, seconds = number_of(trial, "flops"), number_of(trial, "train_seconds")
    if flops is not None:
        words = [] if seconds is None else [f"{figures.duration(seconds)} of training"]
        tiles.append(Tile("Cost of such a run", figures.quantity(flops, "FLOP"), "; ".join(words)))
    return tiles


def _sections(sweep: Sweep, plots: Mapping[str, Plot | None]) -> list[Section]:
    failures = tables.failures_table(sweep)
    count = len(failures.rows) if failures else 0
    sections = [
        _recommendation(sweep),
        _certainty(sweep),
        _searched(sweep),
        _plane(sweep, plots["plane"]),
        _importance(sweep, plots["importance"]),
        _parallel(plots["parallel"]),
        _progress(sweep),
        _trials(sweep),
        Section(
            "Trials that did not finish as planned" + (f": {count}" if count else ""),
            [] if failures or not sweep.all else ["None."],
            some(failures),
        ),
        _settings(sweep),
    ]
    return [one for one in sections if one.lead or one.notes or one.tables or one.plots or one.panels or one.code]


# ------------------------------------------------------------------------------------------------------ the answer


def _recommendation(sweep: Sweep) -> Section:
    trial, chosen = sweep.recommended, sweep.chosen
    objective, utility = (noun(name) for name in (sweep.objective, sweep.utility))
    if trial is None or chosen is None:
        return Section("What to do", lead=_nothing(sweep), tables=some(tables.candidates_table(sweep)))
    above = len(sweep.enough)
    if sweep.floor is None:
        why = f"it has the best {objective} of all trials"
    elif above == 1:
        why = f"it alone has a {utility} of at least {_floor(sweep)}"
    else:
        why = f"it has the best {objective} among the {above} trials whose {utility} is at least {_floor(sweep)}"
    notes = [f"Take trial {trial['number']}: {why}."]
    if chosen.get("model"):
        notes.append(f"Its model lies in {chosen['model']}. To train it again, on this or other data:")
    config = chosen.get("config_file") or "best.yaml"
    code = [
        f"ofmu unlearn --config {config}",
        f"# what {config} sets besides the sweep's base\n"
        + yaml_text(_nested(chosen.get("options") or options(trial))),
    ]
    return Section("What to do", lead=notes, code=code, more=tables.figures_tables(sweep))


def _nothing(sweep: Sweep) -> list[str]:
    utility = noun(sweep.utility)
    if sweep.nearest is not None:
        reached = number_of(sweep.nearest, sweep.utility)
        if sweep.goal.degenerate(sweep.nearest):
            return [
                f"All trials that came to their end are degenerate; trial {sweep.nearest['number']} stands first in "
                f"the rule's order ({degeneration.words(sweep.nearest, sweep.goal.sound)}). Nothing is recommended.",
                "Widen the space towards smaller learning rates or fewer rounds.",
            ]
        return [
            f"No trial meets the floor: the {utility} must be at least {_floor(sweep)}, and the nearest trial, "
            f"{sweep.nearest['number']}, has {figures.number(reached)}. Nothing is recommended.",
            "Lower select.utility_floor, widen the space towards smaller learning rates or fewer rounds, or make more "
            "trials.",
        ]
    if sweep.whole:
        return ["No trial is chosen yet."]
    failed = sum(trial.get("status") == "failed" for trial in sweep.trials)
    if not sweep.trials:
        return ["No trial has ended yet: there is nothing to recommend."]
    return [
        f"No trial came to its end with both {noun(sweep.objective)} and {utility}: there is nothing "
        f"to recommend. {failed} of {len(sweep.trials)} trials failed; the reasons stand below."
    ]


def _floor(sweep: Sweep) -> str:
    share, base = sweep.rule.get("utility_floor"), sweep.rule.get("relative_to") or "target"
    of = "" if share is None else f" ({share:g} × the {base}{' model' if base == 'retrained' else ''}'s)"
    return f"{figures.number(sweep.floor)}{of}"


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in dotted.items():
        *parents, last = name.split(".")
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


# -------------------------------------------------------------------------------------------------------- how sure


def _certainty(sweep: Sweep) -> Section:
    trial = sweep.recommended
    if trial is None:
        return Section("How sure")
    objective = noun(sweep.objective)
    notes = [
        f"The chosen trial is the best of {len(sweep.enough)}: the figure it was chosen by is flattered by the choice, "
        "the more so the more trials there are. Its interval is over rows alone and does not allow for that; "
        f"{tables.judged_on(sweep)}."
        if len(sweep.enough) > 1
        else f"There was no other trial to choose; {tables.judged_on(sweep)}, and its interval is over rows alone."
    ]
    if trial.get("status") != "finished":
        notes.append(f"Its run ended before its last round: {trial.get('message') or trial.get('status')}.")
    if sweep.objective.endswith("forget_quality") and sweep.search.get("rows") is not None:
        notes.append(
            "Forget quality is a p-value: the same difference to the retrained model gives a smaller one on more rows. "
            "Figures on all rows are not comparable with those as judged; KS distances are."
        )
    good = [one for one in sweep.fresh if number_of(one, sweep.objective) is not None]
    if good:
        cell = tables.fresh_cell(sweep.fresh, sweep.objective)
        notes.append(
            f"Its options ran again with {_count(len(sweep.fresh), 'fresh seed')}, which no choice has flattered: "
            f"{objective} {cell.text} ({'; '.join(cell.lines)}). Believe these runs."
        )
        missed = [one for one in good if sweep.goal.enough(one) is False]
        if missed:
            seeds = ", ".join(str(one.get("seed")) for one in missed)
            notes.append(f"Of these, seed {seeds} has less utility than the floor {_floor(sweep)}.")
    else:
        notes.append(
            "All its runs on fresh seeds failed, for the reasons below: no figure is free of the choice's flattery."
            if sweep.fresh
            else "It was not run again with a fresh seed: set select.seeds for a figure free of the choice's flattery."
        )
    rivals = _rivals(sweep, trial)
    if rivals:
        notes.append(
            f"{_count(len(rivals), 'further trial')} with enough utility cannot be told from it by {objective}, with "
            f"intervals that reach its figure: {', '.join(str(rival['number']) for rival in rivals)}."
        )
    low = number_of(trial, f"{sweep.utility}_low")
    if sweep.floor is not None and low is not None and low < sweep.floor:
        high = number_of(trial, f"{sweep.utility}_high")
        notes.append(
            f"The interval of its {noun(sweep.utility)} ({span(low, high)}) reaches below the floor "
            f"of {figures.number(sweep.floor)}: on other rows it may miss it."
        )
    return Section("How sure", lead=notes)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _rivals(sweep: Sweep, chosen: Trial) -> list[Trial]:
    """Trials with enough utility whose interval of the objective holds the chosen trial's figure."""
    value, found = float(chosen[sweep.objective]), []
    for trial in sweep.enough:
        low, high = (number_of(trial, f"{sweep.objective}_{end}") for end in ("low", "high"))
        if trial is not chosen and low is not None and high is not None and low <= value <= high:
            found.append(trial)
    return found


# -------------------------------------------------------------------------------------------------- what was searched


def _searched(sweep: Sweep) -> Section:
    found = some(tables.space_table(sweep), tables.search_table(sweep))
    return Section("What was searched", tables=found, more=some(tables.budget_table(sweep)) if sweep.all else ())


def _plane(sweep: Sweep, plot: Plot | None) -> Section:
    title = "Forgetting and utility"
    if plot is None:
        return Section(title, ["No trial has been evaluated yet."] if sweep.trials else [])
    without = sum(
        any(sweep.last(trial, name) is None for name in (sweep.objective, sweep.utility)) for trial in sweep.trials
    )
    notes = [
        "Up and to the right is better. Line: the Pareto front of the trials that ran to their end. Hollow: trials "
        "without a result, where they stood at their last evaluation. ★ retrained model, ✖ target; hover a point "
        "for its trial." + (f" {without} without an evaluation are not drawn." if without else "")
    ]
    if sweep.fresh:
        notes.append("Fresh seeds are evaluated on all rows, trials as the rule says.")
    return Section(title, notes, plots=[plot])


def _importance(sweep: Sweep, plot: Plot | None) -> Section:
    title, count = "Which options matter", len(sweep.whole)
    table = tables.importance_table(sweep)
    if not count:
        return Section(title)
    ranks = (
        "Rank correlation (Spearman's) sees rising and falling effects only; few trials give large ones by chance, and "
        "all options of a trial are drawn together, so that it may be another option's."
    )
    if plot is None:
        notes = [
            f"{count} trials ran to their end; importances mean nothing below {MINIMUM_TRIALS} and are not shown."
            if count < MINIMUM_TRIALS
            else "No option or no figure varies: there is no importance to speak of.",
            ranks,
        ]
        return Section(title, notes if table else notes[:1], some(table))
    notes = [
        f"PED-ANOVA over the {count} trials that ran to their end: how far an option's values in the better half "
        "differ from those in all. Lines: 95 % bootstrap intervals over trials. Filled: shuffled outcomes make any "
        "option look as important in less than 5 % of cases; hollow: it may be chance."
    ]
    if count < RELIABLE_ORDER:
        notes.append("With this few trials the first place is fairly reliable, the order of the rest is not.")
    notes.append(ranks)
    return Section(title, notes, plots=[plot], more=some(table))


def _parallel(plot: Plot | None) -> Section:
    notes = (
        "One line per trial that ran to its end. Darker (brighter on a dark page) and thicker is better by the rule; "
        "below an axis stand zeros of a logarithmic axis and options that a trial does not have. Up is better on the "
        "last two axes."
    )
    return Section("Every trial at once", [notes], plots=[plot]) if plot else Section("Every trial at once")


def _progress(sweep: Sweep) -> Section:
    panels = progress_figures(sweep)
    notes = [
        "The cost of every trial counts, of those that ended early and of those that failed too; only trials that ran "
        "to their end are drawn. A line that is still rising at its end says that more trials might help."
    ]
    return Section("Cost spent and quality reached", notes if panels else (), panels=panels)


def _trials(sweep: Sweep) -> Section:
    table = tables.trials_table(sweep)
    note = "Figures of trials that ended early or failed are those of their last evaluation. Export: trials.csv."
    return Section("All trials", [note] if table else (), some(table))


def _settings(sweep: Sweep) -> Section:
    config = sweep.settings.get("config") or {}
    if not config:
        return Section("Settings")
    return Section("Settings", code=[yaml_text(config)], fold="The whole configuration")
