"""`ofmu benchmark`: methods x splits x seeds at equal compute, equally tuned, reported on fresh seeds."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ofmu_ray import progress
from ofmu_ray.cluster.join import join_cluster, run_paths
from ofmu_ray.config import (
    LABELS,
    BenchmarkConfig,
    StopConfig,
    UnlearnConfig,
    apply_overrides,
    flatten,
    to_dict,
)
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.rule import Choice, Goal, select
from ofmu_ray.reporting.manifest import code_version
from ofmu_ray.runs.claims import locked, refuse_taken
from ofmu_ray.runs.pool import Pool
from ofmu_ray.runs.preflight import check_machine, prepare_folder, public
from ofmu_ray.runs.trial import PRIVATE, SplitData, Trial, cost_signature, read_result, result_path, write_failure
from ofmu_ray.runs.trial_data import checked, prepare
from ofmu_ray.search import benchmark_output as results
from ofmu_ray.search.judging import goal_of, reference_value
from ofmu_ray.search.priors import parse_priors
from ofmu_ray.search.spaces import Space, space_for
from ofmu_ray.storage import explained

COST_ROUNDS = 2
TINY_RATE = 1e-12
"""Learning rate of the rounds that measure a round's cost: so small that no draw diverges."""
NO_STOP = to_dict(StopConfig())
MARGIN = 1.03
"""Factor on the rounds that the budget should last for; the FLOPs counted by the run stop it (stop.max_flops)."""


@dataclass(frozen=True)
class BenchmarkOutcome:
    """A finished benchmark."""

    complete: bool
    """Whether every method has a reported run on every split."""
    table: str
    """The comparison, for a terminal."""
    files: Sequence[Path]
    """Tables and pages written."""
    mlflow: str
    """How to look at it in MLflow."""


def benchmark(config: BenchmarkConfig, command: Sequence[str] = ()) -> BenchmarkOutcome:
    """Run what has no result under <storage>/<name>/trials yet, then write tables and report.

    Raises:
        UserError: something in the configuration or the data must change, or the storage refuses.
    """
    with explained(config.storage):
        return _compared(config, command)


def _compared(config: BenchmarkConfig, command: Sequence[str]) -> BenchmarkOutcome:
    from ofmu_ray import tracking

    storage = prepare_folder(config.storage)
    training = check_machine(config.base.training)
    config = replace(config, base=replace(config.base, training=training))
    spaces = {label: space_of(config, label) for label in config.methods}
    evaluators = {split: _checked_split(config, split, storage) for split in config.splits}
    folder = storage / config.name
    refuse_taken(folder)
    tags = {"ofmu.kind": "benchmark"}
    record = folder / tracking.RECORD
    handle = tracking.start(config.base.tracking, str(storage), config.name, public(config), tags, record=record)
    status: Any = "FAILED"
    files: list[Path] = []
    table = ""
    try:
        with tracking.system_metrics(handle, enabled=config.base.tracking.system_metrics), locked(folder):
            by_split = [run_paths(config.run(split, config.methods[0]), f"{split}: ") for split in config.splits]
            join_cluster(
                training, storage, {option: paths for paths_of in by_split for option, paths in paths_of.items()}
            )
            progress.note("benchmark", f"{folder}")
            bench = BenchmarkRun(config, storage, evaluators, spaces, handle)
            complete = bench.run()
            files = results.write(
                bench.folder, config, bench.data, bench.references, bench.done, bench.selected, bench.goals,
                list(command),
            )  # fmt: skip
            table = results.table(config, bench.done, bench.references)
            bench.discard()  # within the lock: the next start may put its own files there
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tables = [path for path in files if path.suffix == ".parquet"]
        pages = [path for path in files if path.suffix in (".html", ".md", ".json")]
        words = {"command": shlex.join(command), "commit": code_version()["commit"], "text": table}
        described = partial(tracking.describe_words, **words)
        tracking.finish(handle, described=described, artifacts=pages, tables=tables, status=status)
    return BenchmarkOutcome(complete, table, files, tracking.open_command(handle))


def space_of(config: BenchmarkConfig, label: str) -> Space:
    """The search space of a label: its method's, scaled, with the user's priors, without what the label fixes.

    Raises:
        UserError: a prior names a field that does not exist, or values that the field does not take.
    """
    known = LABELS | config.labels
    base = config.run(next(iter(config.splits)), label)
    fixed = flatten(known[label])
    space = space_for(label, base, config.tuning.lr_scale).with_priors(dict.fromkeys(fixed))
    for name in (base.method, label):
        priors = config.tuning.spaces.get(name, {})
        space = space.with_priors(parse_priors(priors, option=f"tuning.spaces.{name}"))
    space.check(base)
    return space


def _checked_split(config: BenchmarkConfig, split: str, storage: Path) -> Any:
    rule = config.rule
    required = {"rule.objective": rule.objective, "rule.utility": rule.utility}
    generation = "tuning.max_new_tokens", config.tuning.max_new_tokens
    return checked(config.run(split, config.methods[0]), storage, required, generation, split=f"{split}: ")


class BenchmarkRun:
    """A benchmark in progress: its prepared data, finished runs and choices."""

    def __init__(
        self,
        config: BenchmarkConfig,
        storage: Path,
        evaluators: Mapping[str, Any],
        spaces: Mapping[str, Space],
        handle: Any,
    ) -> None:
        self.config, self.spaces, self.handle = config, spaces, handle
        self.storage, self.folder = storage, storage / config.name
        self.data: dict[str, SplitData] = {}
        self.references: dict[str, dict[str, Any]] = {}
        """Split -> model (target, retrained) -> per-row values."""
        self.done: list[tuple[Trial, dict[str, Any]]] = []
        self.selected: dict[tuple[str, str], results.ChosenTrial] = {}
        self.goals: dict[str, Goal] = {}
        for split, evaluator in evaluators.items():
            base = config.run(split, config.methods[0])
            self.data[split], self.references[split] = prepare(split, base, storage, self.folder, evaluator)
        seeds, methods, splits = len(config.seeds), len(config.methods), len(config.splits)
        draws = config.tuning.trials + config.tuning.refine
        self.total = splits * (methods * (draws + seeds) + len(config.ablation.variants) * seeds)
        self.pool = Pool(config.base, self.data, config.concurrency)
        self.seconds: list[float] = []
        self.costs: dict[str, dict[str, float] | str] = {}
        """Split and kind of round -> the cost of a round, or why it does not run."""

    def run(self) -> bool:
        """Run all phases; False: some method has no reported run."""
        config = self.config
        try:
            tuning = config.tuning
            bases = {(split, label): config.run(split, label) for split in config.splits for label in config.methods}
            self._tune(
                {
                    (split, label): self.spaces[label].draws(tuning.trials, tuning.seed, base)
                    for (split, label), base in bases.items()
                }
            )
            for split in config.splits:
                self.goals[split] = self._goal(split)
                if self.goals[split].sound is None:
                    progress.note(
                        "select",
                        f"{split}: generations are missing or shorter than the references': none is degenerate",
                    )
            if tuning.refine:
                self._tune(self._refined(bases), first=tuning.trials)
            for split, label in bases:
                self._select(split, label)
            reported = [(label, split, "report", choice) for (split, label), choice in self.selected.items()]
            reported += [
                (variant, split, "ablation", choice)
                for variant in config.ablation.variants
                for (split, label), choice in self.selected.items()
                if label == config.ablation.of
            ]
            self._execute(
                [
                    (label, split, phase, choice.trial, seed, choice.options)
                    for label, split, phase, choice in reported
                    for seed in config.seeds
                ]
            )
        finally:
            self.pool.close()
        good = {(t.split, t.method) for t, result in self.done if t.phase == "report" and "figures" in result}
        return len(good) == len(config.splits) * len(config.methods)

    # --------------------------------------------------------------------------------------------------- running

    def _execute(self, wanted: Sequence[tuple[str, str, str, int, int, Mapping[str, Any]]]) -> None:
        """Run what has no result yet; the cost of one round determines a method's number of rounds."""
        configs = [self.config.run(split, label, options) for label, split, _, _, _, options in wanted]
        costs = self._costs([(one[0], one[1], config) for one, config in zip(wanted, configs, strict=True)])
        trials = [self._trial(*one, config, cost) for one, config, cost in zip(wanted, configs, costs, strict=True)]
        todo = []
        for trial, cost in zip(trials, costs, strict=True):
            known = self._known(trial)
            if known is not None:
                self._finished(trial, known, again=False)
            elif isinstance(cost, str):
                self._finished(trial, write_failure(trial, self.data[trial.split], cost), again=True)
            else:
                todo.append(trial)
        for trial, result in self.pool.run(todo):
            self._finished(trial, result, again=True)

    def _known(self, trial: Trial) -> dict[str, Any] | None:
        result = read_result(self.folder, trial.key(self.data[trial.split]))
        return None if result and result["status"] == "failed" and self.config.retry_failed else result

    def _finished(self, trial: Trial, result: dict[str, Any], *, again: bool) -> None:
        self.done.append((trial, result))
        path = result_path(self.folder, trial.key(self.data[trial.split]))
        results.log_child(self.handle, self.config, trial, result, path.with_suffix(".mlflow"), again=again)
        if again and result.get("total_seconds"):
            self.seconds.append(result["total_seconds"])
        left = self.total - len(self.done)
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else 0.0
        eta = f", about {results.duration(left * mean / self.pool.size)} left" if again and left else ""
        known = "" if again else " (from before)"
        progress.note(
            "", f"[{len(self.done)}/{self.total}] {trial.name}: {results.line(self.config, result)}{known}{eta}"
        )

    def _trial(
        self,
        label: str,
        split: str,
        phase: str,
        number: int,
        seed: int,
        options: Mapping[str, Any],
        config: UnlearnConfig,
        cost: Mapping[str, float] | str,
    ) -> Trial:
        budget, tuning = self.config.budget, self.config.tuning
        changes: dict[str, Any] = {"seed": seed, **self._limits(label, split, cost)}
        if phase == "tune" and tuning.max_new_tokens is not None:
            changes["evaluation"] = {"max_new_tokens": tuning.max_new_tokens}
        return Trial(
            method=label,
            split=split,
            phase=phase,
            trial=number,
            config=apply_overrides(config, changes),
            options=options,
            budget_unit=budget.unit,
            budget=budget.of(split),
            rows=tuning.rows if phase == "tune" else None,
        )

    def _limits(self, label: str, split: str, cost: Mapping[str, float] | str) -> dict[str, Any]:
        """Rounds that the budget lasts for. FLOPs depend on the batches, so the run itself counts them and stops."""
        if isinstance(cost, str):
            return {}
        unit, amount = self.config.budget.unit, self.config.budget.of(split)
        if cost[unit] > amount:
            raise UserError(
                f"budget: one round of {label} on {split} costs {cost[unit]:.4g} {unit}, more than the {amount:.4g} of "
                f"a run: give at least {cost[unit]:.4g}, or smaller batches or fewer steps"
            )
        if unit == "passes":
            return {"training": {"rounds": math.floor(amount / cost[unit])}}
        return {"training": {"rounds": math.ceil(MARGIN * amount / cost[unit]) + 1}, "stop": {"max_flops": amount}}

    def _costs(self, wanted: Sequence[tuple[str, str, UnlearnConfig]]) -> list[dict[str, float] | str]:
        """The expected cost of a round of each, or why it could not be measured.

        It is measured by two rounds, run once per kind of round.
        """
        pilots: dict[str, Trial] = {}
        keys = []
        for label, split, config in wanted:
            changes = {"seed": self.config.tuning.seed, "training": {"rounds": COST_ROUNDS}, "stop": NO_STOP}
            still = {f"{name}.lr": TINY_RATE for name in config.method_options.optimizer_fields}
            config = apply_overrides(config, {**changes, config.method: still})
            keys.append(f"{split} {sorted(cost_signature(config).items())}")
            pilots.setdefault(
                keys[-1],
                Trial(
                    method=label, split=split, phase="cost", trial=0, config=config, options={},
                    budget_unit=self.config.budget.unit, budget=0.0,
                ),
            )  # fmt: skip
        pilots = {key: trial for key, trial in pilots.items() if key not in self.costs}
        results_by_key = {key: known for key, trial in pilots.items() if (known := self._known(trial)) is not None}
        missing = {id(trial): key for key, trial in pilots.items() if key not in results_by_key}
        for trial, result in self.pool.run([pilots[key] for key in missing.values()]):
            results_by_key[missing[id(trial)]] = result
        for key, result in results_by_key.items():
            good = result["status"] == "finished"
            self.costs[key] = results.round_cost(result, self.data[pilots[key].split]) if good else result["message"]
        return [self.costs[key] for key in keys]

    # -------------------------------------------------------------------------------------------------- choosing

    def _tune(self, draws: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], first: int = 0) -> None:
        """Run the tuning trials for these draws, by split and label; `first`: the number of each first draw."""
        seed = self.config.tuning.seed
        self._execute(
            [
                (label, split, "tune", number, seed, options)
                for (split, label), drawn in draws.items()
                for number, options in enumerate(drawn, start=first)
            ]
        )

    def _refined(self, bases: Mapping[tuple[str, str], UnlearnConfig]) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """A second round of draws, around the rule's choice in the first; none for a method without a choice."""
        tuning, draws = self.config.tuning, {}
        for (split, label), base in bases.items():
            choice = self._choice(split, label)
            if choice is None:
                self.total -= tuning.refine
                continue
            number, options = int(choice.trial["trial"]), json.loads(choice.trial["options"])
            space = self.spaces[label].around(options, f"around trial {number}")
            # not the first round's seed, or both rounds would divide their ranges alike
            draws[split, label] = space.draws(tuning.refine, (tuning.seed, 1), base)
        return draws

    def _goal(self, split: str) -> Goal:
        """The rule with its numbers: metrics of the reference models on the rows that tuning trials are judged on."""
        rule, tuning = self.config.rule, self.config.tuning
        known = self.data[split], self.references[split]
        target = reference_value(*known, tuning.rows, "target", rule.utility)
        return goal_of(
            *known,
            objective=rule.objective,
            utility=rule.utility,
            floor=math.nan if target is None else rule.floor * target,
            rows=tuning.rows,
            longest=tuning.max_new_tokens,
            margin=0.0 if target is None else rule.margin * target,
        )

    def _choice(self, split: str, label: str) -> Choice | None:
        goal = self.goals[split]
        rows = [
            results.trial_row(trial, result, sound=goal.sound)
            for trial, result in self.done
            if (trial.method, trial.split) == (label, split)
        ]
        return select(rows, goal)

    def _select(self, split: str, label: str) -> None:
        """The rule's choice for a method, by metrics on the sampled rows, as is the target's utility for the floor."""
        choice, rule = self._choice(split, label), self.config.rule
        if choice is None:
            progress.note("select", f"{label} {split}: no trial has {rule.objective} and {rule.utility}; not reported")
            return
        number, options = int(choice.trial["trial"]), json.loads(choice.trial["options"])
        self.selected[split, label] = results.ChosenTrial(number, options, choice.floor_missed, choice.degenerate)
        notes = ["no trial reaches the floor"] * choice.floor_missed + ["all are degenerate"] * choice.degenerate
        progress.note("select", f"{label} {split}: trial {number}" + (f" ({'; '.join(notes)})" if notes else ""))

    def discard(self) -> None:
        """Delete everything that contains the forget rows' text, and what killed runs left behind."""
        for name in (PRIVATE, "work"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
