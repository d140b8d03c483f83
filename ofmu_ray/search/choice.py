"""What a sweep chooses: the trial by the rule, its model and configuration, and priors for the next sweep."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from ofmu_ray.config import UnlearnConfig, apply_overrides, to_dict
from ofmu_ray.metrics.fronts import plain
from ofmu_ray.models.source import adapter_base, correct_base
from ofmu_ray.runs.trial import model_path
from ofmu_ray.search.priors import narrowed, text_of
from ofmu_ray.search.trial_ledger import TrialLedger, ranked
from ofmu_ray.storage import atomic_dir, atomic_write

BEST = "best"
PRIORS_FROM = 3
"""Minimum number of trials with enough utility for exporting priors."""


@dataclass
class SweepChoice:
    """The result of a sweep."""

    chosen: int | None = None
    nearest: int | None = None
    """The first trial in the rule's order, if none may be chosen: all miss the floor or are degenerate."""
    front: list[int] = field(default_factory=list)
    metrics: dict[str, Any] | None = None
    """Metrics of the chosen trial's model, on all rows."""
    confirmed: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(fresh seed, result) of the chosen options, on all rows."""


def choose(ledger: TrialLedger) -> SweepChoice:
    """The rule's choice among the completed trials, and the Pareto front of those not degenerate."""
    goal, numbers = ledger.search.goal, range(len(ledger.suggestions))
    order = ranked(ledger, numbers)
    outcome = SweepChoice(front=pareto(ledger, sound_only(ledger, order)))
    if order and goal.eligible(plain((ledger.result(order[0]) or {})["figures"])):
        outcome.chosen = order[0]
    elif order:
        outcome.nearest = order[0]
    return outcome


def pareto(ledger: TrialLedger, numbers: Sequence[int]) -> list[int]:
    """Trials that no other trial beats in both objective and utility, by increasing objective."""
    from ofmu_ray.metrics.fronts import pareto_front

    points = plane(ledger, numbers)
    return [numbers[int(index)] for index in pareto_front(points)] if points else []


def sound_only(ledger: TrialLedger, numbers: Sequence[int]) -> list[int]:
    """The trials that are not degenerate. All must have metrics."""
    values = {number: plain((ledger.result(number) or {})["figures"]) for number in numbers}
    return [number for number in numbers if not ledger.search.goal.degenerate(values[number])]


def plane(ledger: TrialLedger, numbers: Sequence[int]) -> list[tuple[float, float]]:
    """(objective on its scale from 0 to 1, utility) of trials with metrics."""
    goal = ledger.search.goal
    values = [plain((ledger.result(number) or {})["figures"]) for number in numbers]
    return [(float(goal.height(one) or 0.0), float(one[goal.utility])) for one in values]


def prune_models(ledger: TrialLedger) -> None:
    """Keep only the models of the best trials (keep_models), and checkpoints only if trials may resume from them."""
    kept = set(ranked(ledger, range(len(ledger.suggestions)))[: ledger.config.keep_models])
    for number in range(len(ledger.suggestions)):
        if number not in kept and ledger.result(number) is not None:
            shutil.rmtree(model_path(ledger.folder, ledger.key(number)), ignore_errors=True)
    if ledger.config.search.kind != "population":
        shutil.rmtree(ledger.folder / "checkpoints", ignore_errors=True)


def best_config(ledger: TrialLedger, number: int) -> UnlearnConfig:
    """The chosen trial as a standalone run, evaluated as the base says."""
    config = apply_overrides(ledger.config.run, ledger.suggestions[number].options)
    return replace(config, name=f"{ledger.config.name}-best", storage=ledger.config.storage)


def export(ledger: TrialLedger, outcome: SweepChoice, retrained: Any) -> None:
    """Write best.yaml, best/model and best/metrics.json of the chosen trial; put its metrics on all rows in `outcome`.

    What an earlier start chose is removed if no trial may be chosen, or if the trial's model is not kept, as under
    another rule it was not among the best: it would not be this sweep's choice.
    """
    folder, number = ledger.folder, outcome.chosen
    if number is None:
        shutil.rmtree(folder / BEST, ignore_errors=True)
        (folder / "best.yaml").unlink(missing_ok=True)
        return
    config = best_config(ledger, number)
    head = f"# Trial {number} of sweep {ledger.config.name}: ofmu unlearn --config {folder / 'best.yaml'}\n"
    if ledger.suggestions[number].parent is not None:
        head += "# Its model continued from other members' weights: a run of these options alone gives another model.\n"
    atomic_write(folder / "best.yaml", head + yaml.safe_dump(to_dict(config), sort_keys=False))
    model = model_path(folder, ledger.key(number))
    if not model.is_dir():
        shutil.rmtree(folder / BEST, ignore_errors=True)
        return
    with atomic_dir(folder / BEST / "model") as folder_in_progress:
        shutil.copytree(model, folder_in_progress, dirs_exist_ok=True, copy_function=_linked)
        correct_base(folder_in_progress, adapter_base(model))
    evaluator = replace(ledger.data.evaluator, evaluation=config.evaluation, seed=config.seed)
    table = evaluator.table(str(folder / BEST / "model"), "best")
    outcome.metrics = evaluator.metrics(table, retrained)
    atomic_write(folder / BEST / "metrics.json", json.dumps({"after": outcome.metrics}, indent=1) + "\n")


def _linked(source: str, place: str) -> None:
    try:
        os.link(source, place)  # a hard link if the file system can: no second copy of the weights
    except OSError:
        shutil.copy2(source, place)


# ----------------------------------------------------------------------------------------------------------- priors


def priors(ledger: TrialLedger) -> dict[str, str]:
    """Narrower priors by field, from the better third of the trials with enough utility.

    They are for a second sweep (space_file) on more rows or a larger model. Empty with fewer than three such trials.
    """
    goal = ledger.search.goal
    order = ranked(ledger, range(len(ledger.suggestions)))
    good = [n for n in order if goal.eligible(plain((ledger.result(n) or {})["figures"]))]
    if len(good) < PRIORS_FROM:
        return {}
    best = good[: max(PRIORS_FROM, math.ceil(len(good) / 3))]
    priors_by_field = {}
    for knob in ledger.search.space.knobs:
        options = [ledger.suggestions[n].options for n in best]
        drawn = [one[knob.field] for one in options if knob.field in one]
        if drawn:
            priors_by_field[knob.field] = text_of(narrowed(knob.prior, drawn))
    return priors_by_field
