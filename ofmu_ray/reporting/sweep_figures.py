"""From a sweep's trials to the points and lines of its plots."""

from __future__ import annotations

from typing import Any

from ofmu_ray.metrics.fronts import Trial, number_of
from ofmu_ray.reporting import figures
from ofmu_ray.reporting.marks import Plot
from ofmu_ray.reporting.sweep_parallel import Trace, parallel_plot, scale
from ofmu_ray.reporting.sweep_plots import Point, Reached, importance_plot, kind_of, plane, progress_plot
from ofmu_ray.reporting.sweep_results import Sweep, noun, options, short
from ofmu_ray.reporting.sweep_tables import options_words


def plane_figure(sweep: Sweep) -> Plot | None:
    """All trials with both figures, those of ended ones from their last evaluation; None without any."""
    points = []
    for trial in sweep.all:
        x, y = sweep.last(trial, sweep.utility), sweep.last(trial, sweep.objective)
        fresh = trial.get("phase") == "confirm"
        if fresh:  # its number is the chosen trial's, whose evaluations on the way are not its own
            x, y = number_of(trial, sweep.utility), number_of(trial, sweep.objective)
        if x is not None and y is not None:
            kind = kind_of(str(trial.get("status")), str(trial.get("phase")))
            chosen = trial is sweep.recommended
            front = bool(trial.get("front")) and not fresh
            points.append(Point(x, sweep.axis.place(y), kind, _words(sweep, trial, x, y), front, chosen))
    if not points:
        return None
    references = {}
    for model in ("target", "retrained"):
        x, y = sweep.reference(model, sweep.utility), sweep.reference(model, sweep.objective)
        if x is not None and y is not None:
            references[model] = Point(x, sweep.axis.place(y), "", f"{model}: {_pair(sweep, x, y)}")
    x_label = noun(sweep.utility)
    return plane("Forgetting and utility", points, references, sweep.floor, sweep.axis, x_label)


def _pair(sweep: Sweep, x: float, y: float) -> str:
    objective, utility = (noun(name) for name in (sweep.objective, sweep.utility))
    return f"{objective} {figures.number(y)}, {utility} {figures.number(x)}"


def _words(sweep: Sweep, trial: Trial, x: float, y: float) -> str:
    fresh = f" with fresh seed {trial.get('seed')}" if trial.get("phase") == "confirm" else ""
    status = str(trial.get("status")).replace("_", " ")
    return f"trial {trial['number']}{fresh}, {status}: {_pair(sweep, x, y)}; {options_words(sweep, trial)}"


def parallel_figure(sweep: Sweep) -> Plot | None:
    """Options and both figures of the trials that ran to their end; None with fewer than two."""
    trials = sweep.whole
    if len(trials) < 2 or not sweep.space:
        return None
    drawn = [options(trial) for trial in trials]
    scales = []
    for knob in sweep.space:
        values = [one.get(knob["field"]) for one in drawn]
        label = short(str(knob["field"]), sweep.space)
        if any(value is not None for value in values):
            scales.append(scale(label, values, "loguniform" in str(knob["prior"])))
    axis = sweep.axis
    goals = [axis.place(float(trial[sweep.objective])) for trial in trials]
    # values that span hundreds of orders would leave nothing but the axis' ends to see
    name = noun(sweep.objective)
    scales.append(scale(name if axis.reference is None else f"{name} distance", goals, axis.log, axis.falling))
    utility = [float(trial[sweep.utility]) for trial in trials]
    scales.append(scale(noun(sweep.utility), utility))
    order = sorted(range(len(trials)), key=lambda place: sweep.goal.score(trials[place]))
    ranks: dict[int, float] = {place: rank / (len(trials) - 1) for rank, place in enumerate(order)}
    traces = [
        Trace(ranks[place], sweep.goal.eligible(trial), trial is sweep.recommended,
              _words(sweep, trial, utility[place], float(trial[sweep.objective])))
        for place, trial in enumerate(trials)
    ]  # fmt: skip
    return parallel_plot("Every trial at once", scales, traces)


def importance_figure(sweep: Sweep) -> Plot | None:
    """Importance of each option; None with too few trials."""
    if not sweep.importances:
        return None
    return importance_plot("Which options matter", sweep.importances, lambda field: short(field, sweep.space))


def progress_figures(sweep: Sweep) -> list[Plot]:
    """Best so far against FLOPs and against the clock; empty where no trial came to its end."""
    if not sweep.whole:
        return []
    whole = {id(trial) for trial in sweep.whole}
    ended = [(number_of(trial, "ended_seconds"), trial) for trial in sweep.trials]
    clock = all(seconds is not None for seconds, _ in ended)
    # without a clock (an older file): in the order of their numbers
    ended.sort(key=lambda found: (found[0] or 0.0, found[1]["number"]) if clock else (0.0, found[1]["number"]))
    spent, over_flops, over_time = 0.0, [], []
    for seconds, trial in ended:
        spent += number_of(trial, "flops") or 0.0
        if id(trial) not in whole:
            continue
        y, x = float(trial[sweep.objective]), float(trial[sweep.utility])
        known: dict[str, Any] = {
            "y": sweep.axis.place(y),
            "enough": sweep.goal.eligible(trial),
            "words": _words(sweep, trial, x, y),
        }
        over_flops.append(Reached(spent, **known))
        over_time.append(Reached(seconds or 0.0, **known))
    plots = []
    if spent:
        unit = _unit(spent, ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1.0, "FLOP")))
        plots.append(progress_plot("By what was computed", over_flops, spent, sweep.axis, unit))
    last = max((seconds or 0.0 for seconds, _ in ended), default=0.0)
    if clock and last:
        unit = _unit(last, ((7200.0, "hours"), (120.0, "minutes"), (1.0, "seconds")))
        size = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}[unit[0]]
        plots.append(progress_plot("By the clock", over_time, last, sweep.axis, (unit[0], size)))
    return plots


def _unit(value: float, steps: tuple[tuple[float, str], ...]) -> tuple[str, float]:
    return next(((name, size) for size, name in steps if value >= size), (steps[-1][1], steps[-1][0]))
