"""Plots of the sweep's page: the plane of all trials with its front, and the best so far."""

from __future__ import annotations

import warnings
from typing import Any

from ofmu_ray.attacks.importance import quiet_study
from ofmu_ray.reporting.marks import COLOURS, SHAPES, Key, Plot
from ofmu_ray.reporting.plots import FAINT, INK, inline_svg, new_axes, with_page_colours
from ofmu_ray.reporting.sweep_results import WITHOUT_RESULT, SweepData, noun

_C = list(COLOURS)
_KINDS = (
    ("completed", _C[0], "o", True),
    ("fresh seed", _C[2], "^", True),
    ("without a result, at its last evaluation", _C[7], "v", False),
)
"""Label, colour, marker, filled."""


def front_plot(sweep: SweepData) -> Plot | None:
    """Objective against utility: all trials with the front, the floor and the reference models.

    Stopped and failed trials are shown at their last evaluation. Trials of the front and the chosen one have their
    numbers. None without any evaluation.
    """
    points = [(*place, trial) for trial in sweep.all if (place := sweep.place(trial)) is not None]
    if not points:
        return None
    figure, axes = new_axes(7.4, 4.4)
    if sweep.floor is not None:
        axes.axvline(sweep.floor, color=FAINT, linewidth=1, linestyle="--")
        axes.annotate("floor", (sweep.floor, 0.0), xycoords=("data", "axes fraction"), xytext=(3, 3),
                      textcoords="offset points", color=INK, fontsize=8)  # fmt: skip
    steps = sorted((x, y) for x, y, trial in points if trial.get("front"))
    axes.plot([x for x, _ in steps], [y for _, y in steps], color=_C[0], linewidth=1.3, drawstyle="steps-pre", zorder=2)
    kinds = set()
    for x, y, trial in points:
        kind = _KINDS[2 if trial.get("status") in WITHOUT_RESULT else int(trial.get("phase") == "confirm")]
        _, colour, marker, filled = kind
        kinds.add(kind)
        axes.plot(x, y, marker, color=colour, markersize=6.5, fillstyle="full" if filled else "none",
                  markeredgewidth=0 if filled else 1.2, zorder=4 if filled else 3)  # fmt: skip
        chosen = trial is sweep.recommended
        if chosen:
            axes.plot(x, y, "o", color=INK, fillstyle="none", markersize=13, markeredgewidth=1.5, zorder=5)
        if chosen or (x, y) in steps:
            axes.annotate(str(trial["number"]), (x, y), xytext=(7, 5), textcoords="offset points", color=INK,
                          fontsize=8, fontweight="bold" if chosen else "normal")  # fmt: skip
    middle = sum(axes.get_xlim()) / 2
    for model, marker in (("target", "X"), ("retrained", "*")):
        reference = sweep.reference_place(model)
        if reference is not None:
            side = -1 if reference[0] > middle else 1
            axes.plot(*reference, marker, color=INK, markersize=10, zorder=6, markeredgewidth=0, clip_on=False)
            axes.annotate(model, reference, xytext=(8 * side, 0), textcoords="offset points", color=INK, fontsize=8.5,
                          ha="right" if side < 0 else "left", va="center")  # fmt: skip
    _objective_axis(axes, sweep)
    axes.set_xlabel(noun(sweep.utility))
    shown = [kind for kind in _KINDS if kind in kinds]
    legend = [Key(label, COLOURS[colour], SHAPES[marker], filled) for label, colour, marker, filled in shown]
    legend += [Key("chosen", "var(--ink)", SHAPES["o"], filled=False)] * (sweep.recommended is not None)
    title = "Forgetting and utility"
    return Plot(title, inline_svg(figure, title, COLOURS), legend, wide=True)


def _objective_axis(axes: Any, sweep: SweepData) -> None:
    """Up is better."""
    axes.set_ylabel(sweep.axis.label)
    if sweep.axis.log:
        axes.set_yscale("log")
    if sweep.axis.falling:
        axes.invert_yaxis()


def history_plot(sweep: SweepData) -> Plot | None:
    """Optuna's history plot: the objective of the completed trials and the rule's best so far; None if no trial is
    eligible."""
    import matplotlib
    import optuna
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_optimization_history

    if len(sweep.completed) < 2 or not sweep.enough:
        return None
    study = quiet_study("minimize" if sweep.axis.falling else "maximize")
    for trial in sorted(sweep.completed, key=lambda trial: int(trial["number"])):
        value, missed = sweep.axis.place(float(trial[sweep.objective])), not sweep.choosing.eligible(trial)
        study.add_trial(optuna.create_trial(value=value, constraints={"rule": float(missed)}))
    # contain the style sheet that Optuna sets and its warning that the function is experimental
    with matplotlib.rc_context({"figure.figsize": (7.4, 3.0)}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyplot.switch_backend("agg")
        axes = plot_optimization_history(study)
        with_page_colours(axes)
        _objective_axis(axes, sweep)
        for legend in filter(None, [axes.get_legend()]):
            legend.remove()  # the page explains it
        axes.set(title="", xlabel="completed trials")
        plot = Plot("The best so far", inline_svg(axes.figure, "The best so far"), [], wide=True)
        pyplot.close(axes.figure)
    return plot
