"""The tables of a sweep's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ofmu_ray.metrics.fronts import Trial, geometric_mean, number_of, sensitivity
from ofmu_ray.metrics.intervals import over_seeds
from ofmu_ray.reporting import figures
from ofmu_ray.reporting.benchmark_tables import heading, span
from ofmu_ray.reporting.sweep_plots import importance_words
from ofmu_ray.reporting.sweep_results import Spent, Sweep, noun, options, short, value_words
from ofmu_ray.reporting.tables import Cell, Table, cells

FOLDED_FROM = 30
"""Trials beyond which their list is folded."""


def figures_tables(sweep: Sweep) -> list[Table]:
    """The recommended trial's figures beside fresh seeds and the reference models: those of the rule, then the rest."""
    trial = sweep.recommended
    if trial is None or sweep.chosen is None:
        return []
    whole: Mapping[str, Any] = sweep.chosen.get("figures") or {}
    first = dict.fromkeys((sweep.objective, "ks_statistic", sweep.utility))
    known = {name for name, figure in whole.items() if (figure or {}).get("value") is not None}
    shown = [name for name in first if name in known or name != "ks_statistic"]
    others = [name for name in whole if name in known and name not in first]
    caption = f"Trial {trial['number']} with 95 % intervals; {judged_on(sweep)}"
    found = [_figures_table(sweep, trial, shown, caption)]
    return [*found, _figures_table(sweep, trial, others, "All other figures", folded=True)] if others else found


def _figures_table(sweep: Sweep, trial: Trial, names: Sequence[str], caption: str, folded: bool = False) -> Table:
    references: Mapping[str, Any] = sweep.settings.get("references") or {}
    whole: Mapping[str, Any] = (sweep.chosen or {}).get("figures") or {}
    models = [model for model in ("target", "retrained") if references.get(model)]
    rows = [
        cells(
            heading(name), _reference(whole.get(name)), *([fresh_cell(sweep.fresh, name)] if sweep.fresh else []),
            _figure(trial, name), *(_reference(references[model].get(name)) for model in models),
        )
        for name in names
    ]  # fmt: skip
    header = [
        "Figure", "Chosen, all rows", *(["Fresh seeds, all rows"] if sweep.fresh else []), "Chosen, as judged",
        *(f"{model}, as judged" for model in models),
    ]  # fmt: skip
    return Table(name="", caption=caption, header=header, rows=rows, folded=folded)


def judged_on(sweep: Sweep) -> str:
    """The rows of the rule."""
    rows = sweep.search.get("rows")
    return "trials are judged on all rows" if rows is None else f"trials are judged on {rows} rows of each set"


def fresh_cell(fresh: Sequence[Trial], name: str) -> Cell:
    """Mean over fresh seeds with Student's interval; p-values by their geometric mean, with each run's value."""
    values = [value for trial in fresh if (value := number_of(trial, name)) is not None]
    if not values:
        return Cell("–")
    count = f"{len(values)} of {len(fresh)} seeds"
    if name.endswith("forget_quality"):
        return Cell(
            figures.number(geometric_mean(values)), ("runs " + " · ".join(figures.number(v) for v in values), count)
        )
    found = over_seeds(values)
    return Cell(figures.number(found.value), (span(found.low, found.high), count))


def _figure(trial: Trial, name: str) -> Cell:
    value = number_of(trial, name)
    low, high = number_of(trial, f"{name}_low"), number_of(trial, f"{name}_high")
    return Cell(figures.number(value), (span(low, high),) if low is not None and high is not None else ())


def _reference(figure: Mapping[str, Any] | None) -> Cell:
    found = figures.cell(figure)
    return Cell(found.text, (found.interval,) if found.interval else (), title=found.reason)


def candidates_table(sweep: Sweep) -> Table | None:
    """Where nothing can be recommended: the nearest trial and the front."""
    nearest = sweep.nearest
    shown = [trial for trial in sweep.whole if trial.get("front") or trial is nearest]
    if nearest is not None and nearest not in shown:
        shown.append(nearest)
    if sweep.recommended is not None or not shown:
        return None
    shown.sort(key=lambda trial: -(number_of(trial, sweep.utility) or 0.0))
    rows = [
        cells(
            Cell(str(trial["number"]), ("nearest",) * (trial is nearest)), options_words(sweep, trial),
            *(_figure(trial, name) for name in (sweep.objective, sweep.utility)),
        )
        for trial in shown
    ]  # fmt: skip
    header = ["Trial", "Options", heading(sweep.objective), heading(sweep.utility)]
    caption = "The trial that the rule places first and the Pareto front, by falling utility"
    return Table(name="", caption=caption, header=header, rows=rows, words=2)


def options_words(sweep: Sweep, trial: Trial) -> str:
    """inner.lr = 3.2e-05, beta = 0.1."""
    return ", ".join(f"{short(name, sweep.space)} = {value_words(value)}" for name, value in options(trial).items())


def space_table(sweep: Sweep) -> Table | None:
    """What was tuned, in which ranges and why, and what a next sweep would take."""
    narrowed: Mapping[str, str] = sweep.settings.get("priors") or {}
    rows = []
    for knob in sweep.space:
        given = (f"only where {knob['given']} is not 0",) if knob.get("given") else ()
        more = [narrowed.get(knob["field"], "–")] if narrowed else []
        rows.append(cells(Cell(str(knob["field"]), given), str(knob["prior"]), *more, str(knob.get("why") or "")))
    header = ["Option", "Prior", *(["For a next sweep"] if narrowed else []), "Source of the range"]
    return Table(name="", caption="The space", header=header, rows=rows, words=4)


def search_table(sweep: Sweep) -> Table:
    """How the space was searched."""
    search, early, rule = sweep.search, sweep.early, sweep.rule
    kinds = {
        "random": "random (a Sobol sequence)",
        "tpe": "TPE, a tree-structured Parzen estimator (Optuna), on the rule",
        "multi_objective": "TPE (Optuna) on several objectives: "
        + ", ".join(noun(name) for name in rule.get("objectives") or ()),
        "population": "population-based training",
    }
    ending = {
        "none": "no trial is ended early",
        "asha": f"asynchronous successive halving: one in {float(early.get('reduction_factor') or 0):g} goes on at "
        f"each rung, from evaluation {early.get('grace')} of {early.get('stages')}",
        "median": f"below the median of the others, after evaluation {early.get('grace')} of {early.get('stages')}",
    }
    ties = {"cost": "fewer FLOPs", "order": "the earlier trial"}
    found = {
        "Search": kinds.get(str(search.get("kind"))),
        "Trials": f"{len(sweep.trials)} of {search.get('trials', len(sweep.trials))}",
        "Seed of the search": search.get("seed"),
        "Early stopping": ending.get(str(early.get("kind"))),
        "Rows": judged_on(sweep),
        "Ties": ties.get(str(rule.get("tie_break"))),
    }
    rows = [cells(name, str(words)) for name, words in found.items() if words is not None]
    return Table(name="", caption="The search", header=["Setting", "Value"], rows=rows, words=2)


def budget_table(sweep: Sweep) -> Table:
    """What all of it cost."""
    parts = {"Search": sweep.trials, "Fresh seeds": sweep.fresh, "In all": sweep.all}
    spent: dict[str, Spent] = {name: sweep.spent(trials) for name, trials in parts.items() if trials}
    if not sweep.fresh:
        spent.pop("In all", None)
    rows = []
    for name, cost in spent.items():
        saved = cost.saved_flops
        share = f"{saved / (cost.flops + saved):.0%}" if saved and name == "Search" else ""
        lines = (f"about {figures.quantity(saved, 'FLOP')}",) if share else ()
        rows.append(
            cells(
                name, str(cost.trials), figures.quantity(cost.flops, "FLOP"), Cell(share or "–", lines),
                figures.duration(cost.train_seconds), figures.duration(cost.total_seconds),
            )
        )  # fmt: skip
    header = ["", "Runs", "Spent", "Saved by early stopping", "Training", "With evaluation"]
    caption = "The budget; times are summed over trials, which may have run side by side"
    return Table(name="", caption=caption, header=header, rows=rows)


def importance_table(sweep: Sweep) -> Table | None:
    """Share of each option in either figure, beside the rank correlation."""
    fields = [str(knob["field"]) for knob in sweep.space]
    # the same trials for both columns; `sensitivity` takes those of phase "tune"
    tuned = [{**trial, "phase": "tune"} for trial in sweep.whole]
    ranks = {entry.option: entry for entry in sensitivity(tuned, sweep.objective, sweep.utility)}
    shares = {name: {row.option: row for row in rows} for name, rows in sweep.importances.items()}
    first = shares.get(sweep.objective, {})
    order = sorted(fields, key=lambda field: -(first[field].share if field in first else -1.0))
    rows = []
    for field in order:
        if field not in ranks and not any(field in found for found in shares.values()):
            continue
        entry = ranks.get(field)
        correlations = (entry.objective_correlation, entry.utility_correlation) if entry else (None, None)
        shown = [shares[name].get(field) for name in (sweep.objective, sweep.utility) if name in shares]
        rows.append(
            cells(
                short(field, sweep.space), *("–" if row is None else importance_words(row) for row in shown),
                *("–" if value is None else f"{value:+.2f}" for value in correlations),
            )
        )  # fmt: skip
    names = (sweep.objective, sweep.utility)
    header = [
        "Option",
        *(f"{figures.label(name)}, share" for name in names if name in shares),
        *(f"{figures.label(name)}, rank correlation" for name in names),
    ]
    return Table(name="", caption="", header=header, rows=rows) if rows else None


def trials_table(sweep: Sweep) -> Table | None:
    """Every trial, in the order of the rule."""
    fields = [str(knob["field"]) for knob in sweep.space]
    names = [sweep.objective, sweep.utility]
    whole = {id(trial) for trial in sweep.whole}
    # the rule's order; what has no result comes last, by number
    trials = sorted(
        sweep.trials, key=lambda t: (id(t) not in whole, -sweep.goal.score(t) if id(t) in whole else 0.0, t["number"])
    )
    parents = any(trial.get("parent") is not None for trial in trials)
    rows = []
    for trial in (*trials, *sweep.fresh):
        drawn, chosen = options(trial), trial is sweep.recommended
        degenerate = sweep.goal.degenerate(trial)
        marks = "chosen" if chosen else "degenerate" if degenerate else "front" if trial.get("front") else ""
        fresh = trial.get("phase") == "confirm"
        number = Cell(
            f"seed {trial.get('seed')}" if fresh else str(trial["number"]), (marks,) * bool(marks), strong=chosen
        )
        status = str(trial.get("status")).replace("_", " ")
        stage, stages, seconds = trial.get("stage"), trial.get("stages"), number_of(trial, "train_seconds")
        rows.append(
            cells(
                number, status, *([_dash(trial.get("parent"))] if parents else []),
                *(_figure(trial, name) for name in names), *(_option(drawn, field) for field in fields),
                f"{_dash(stage)} of {_dash(stages)}", _spent(trial),
                "–" if seconds is None else figures.duration(seconds),
            )
        )  # fmt: skip
    header = [
        "Trial", "Status", *(["Parent"] if parents else []), *map(heading, names),
        *(short(field, sweep.space) for field in fields), "Evaluations", "FLOPs", "Training",
    ]  # fmt: skip
    caption = f"All {len(trials)} trials in the order of the rule"
    folded = len(trials) > FOLDED_FROM
    return Table(name="", caption=caption, header=header, rows=rows, words=2, folded=folded) if rows else None


def _dash(value: Any) -> str:
    return "–" if value is None else str(value)


def _option(drawn: Mapping[str, Any], field: str) -> str:
    return value_words(drawn[field]) if field in drawn else "–"


def _spent(trial: Trial) -> str:
    flops = number_of(trial, "flops")
    return "–" if flops is None else figures.quantity(flops).rstrip()


def failures_table(sweep: Sweep) -> Table | None:
    """Trials that neither finished nor were ended by the scheduler, with the reason."""
    bad = [trial for trial in sweep.all if trial.get("status") not in ("finished", "stopped")]
    rows = [
        cells(
            str(trial["number"]) + (f", seed {trial.get('seed')}" if trial.get("phase") == "confirm" else ""),
            str(trial.get("status")).replace("_", " "), f"{_dash(trial.get('stage'))} of {_dash(trial.get('stages'))}",
            str(trial.get("message") or "–"),
        )
        for trial in bad
    ]  # fmt: skip
    header = ["Trial", "Status", "Evaluations", "Reason"]
    return Table(name="", caption="", header=header, rows=rows, words=4) if rows else None


def records(sweep: Sweep) -> list[dict[str, Any]]:
    """trials.csv: what is known of every trial, with a column per option."""
    fields = dict.fromkeys(name for trial in sweep.all for name in options(trial))
    return [{**trial, **{f"option.{name}": options(trial).get(name) for name in fields}} for trial in sweep.all]
