"""`ofmu sweep`: Ray Tune searches a method's options over full unlearning runs; a stated rule chooses."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ofmu_ray import progress
from ofmu_ray.cluster.join import join_cluster, run_paths
from ofmu_ray.config import LABELS, WHERE_KEPT, SweepConfig, UnlearnConfig, flatten, to_dict
from ofmu_ray.config.optimizers import scale_for
from ofmu_ray.config.values import ADDED, EXPORT_PLACES, without_added
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.metrics.fronts import plain
from ofmu_ray.reporting.manifest import code_version
from ofmu_ray.runs.claims import Claim
from ofmu_ray.runs.job import Spec, trained_parameters
from ofmu_ray.runs.pool import Pool
from ofmu_ray.runs.preflight import check_machine, prepare_folder, public
from ofmu_ray.runs.trial import PRIVATE, Trial, read_result
from ofmu_ray.runs.trial_data import checked, prepare
from ofmu_ray.search import choice, sweep_output
from ofmu_ray.search.benchmark_output import duration
from ofmu_ray.search.capacity import check_disk, concurrency
from ofmu_ray.search.judging import goal_of, reference_value
from ofmu_ray.search.priors import parse_priors
from ofmu_ray.search.spaces import Space, read_space, space_for
from ofmu_ray.search.suggest import Search, without_other_batches
from ofmu_ray.search.trial_ledger import TrialLedger
from ofmu_ray.storage import explained

MAY_CHANGE = ("select", "keep_models", "concurrency", "retry_failed")
"""Options that may change between two starts of a sweep, as may the number of trials, except a population's."""


@dataclass(frozen=True)
class SweepOutcome:
    """A sweep that finished or was stopped."""

    complete: bool
    """Whether all trials have finished."""
    chosen: int | None
    """Number of the chosen trial; None: no trial may be chosen."""
    summary: str
    """What was chosen and why, for a terminal."""
    files: Sequence[Path]
    """Tables and pages written."""
    mlflow: str
    """How to look at it in MLflow."""


def space_of(config: SweepConfig) -> Space:
    """What is tuned: the label's space with the user's file and priors, checked against the configuration.

    Raises:
        UserError: a field does not exist or does not take a value, or there is nothing to tune.
    """
    base = config.run
    fixed = {name: None for name in flatten(LABELS[config.label]) if name != "method"}
    space = space_for(config.label, base, config.lr_scale or 1.0).with_priors(fixed)
    if config.space_file is not None:
        space = read_space(config.space_file, space)
    space = space.with_priors(parse_priors(flatten(config.space), option="space"))
    unused = [knob.field for knob in space.knobs if knob.field.split(".")[0] in base.unused_sections]
    if unused:
        raise UserError(f"space: {unused[0]} is not an option of {config.label}, but of another method: remove it")
    if not space.knobs:
        raise UserError(f"space: nothing is left to tune of {config.label}: name a field with a prior")
    try:
        space.check(base)
    except UserError as error:
        raise UserError(f"space: {error}") from None
    return space


def sweep(config: SweepConfig, command: Sequence[str] = ()) -> SweepOutcome:
    """Run the trials that have no result under <storage>/<name>/trials yet, then choose, export and report.

    Raises:
        UserError: something in the configuration or the data must change, or the storage refuses.
    """
    with explained(config.storage):
        return _searched(config, command)


def _searched(config: SweepConfig, command: Sequence[str]) -> SweepOutcome:
    from ofmu_ray import tracking

    storage = prepare_folder(config.storage)
    training = check_machine(config.base.training)
    config = replace(config, base=replace(config.base, training=training))
    config = replace(config, select=config.select.resolved(config.run.evaluation))
    run, select = config.run, config.select
    space = space_of(config)
    required = {"select.objective": select.objective, "select.utility": select.utility}
    if select.relative_to == "retrained" and not run.evaluation.retrained:
        raise UserError("select.relative_to = retrained: there is none; name base.evaluation.retrained")
    evaluator = checked(run, storage, required, ("select.max_new_tokens", select.max_new_tokens), where="base.")
    if config.lr_scale is None:
        config = replace(config, lr_scale=_lr_scale(run))
        space = space_of(config)
    if config.search.kind == "population":
        space, dropped = without_other_batches(space, run)
        if dropped:
            progress.note("search", f"not tuned, as members of a population share their batches: {', '.join(dropped)}")
        if not space.knobs:
            raise UserError("search.kind = population: nothing is left to tune; choose another kind")
    folder = storage / config.name
    kept = config.concurrency or 1
    check_disk(run.model, folder, models=config.keep_models + kept)
    digest = _digest(config, space)
    claim = Claim(str(folder), "sweep", digest, _determining(config))
    claim.check()
    tags = {"ofmu.kind": "sweep", "ofmu.config_hash": digest}
    record = folder / tracking.RECORD
    handle = tracking.start(run.tracking, str(storage), config.name, _determining(config), tags, record=record)
    status: Any = "FAILED"
    files: list[Path] = []
    complete, text = False, ""
    chosen: dict[str, Any] = {}
    try:
        with tracking.system_metrics(handle, enabled=run.tracking.system_metrics), ExitStack() as held:
            join_cluster(training, storage, run_paths(run, "base."))
            at_once = concurrency(training, config.concurrency)
            held.enter_context(claim.held())
            progress.note("sweep", f"{folder}")
            ledger, references = _begin(config, space, evaluator, storage, folder)
            complete = _run_trials(ledger, handle, at_once)
            outcome = choice.choose(ledger)
            choice.export(ledger, outcome, ledger.data.retrained)
            if complete and outcome.chosen is not None:
                outcome.confirmed = _confirm(ledger, outcome.chosen)
            files = sweep_output.write(ledger, outcome, references, list(command))
            text, chosen = sweep_output.summary(ledger, outcome), {"after": outcome.metrics}
            _discard(ledger)  # within the lock: the next start may put its own files there
        status = "FINISHED" if complete else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tables = [path for path in files if path.suffix == ".parquet"]
        pages = [path for path in files if path.suffix in tracking.mlflow_run.ARTIFACT_SUFFIXES]
        words = {"command": shlex.join(command), "commit": code_version()["commit"], "text": text}
        described = partial(tracking.describe_words, **words)
        tracking.finish(handle, metrics=chosen, described=described, artifacts=pages, tables=tables, status=status)
    return SweepOutcome(complete, outcome.chosen, text, files, tracking.open_command(handle))


def _lr_scale(run: UnlearnConfig) -> float:
    count = trained_parameters(Spec.of(run, run.model))
    if count is None:
        return 1.0
    scale = scale_for(count)
    progress.note("rates", f"{scale:g} times those for 1 B parameters (lr_scale), for {count:,} trained parameters")
    return scale


def _determining(config: SweepConfig) -> dict[str, Any]:
    """The options that must agree for two starts to be the same sweep."""
    content = {name: value for name, value in public(config).items() if name not in MAY_CHANGE}
    if config.search.kind != "population":  # its generations divide every run into as many stages
        content["search"] = {name: value for name, value in content["search"].items() if name != "trials"}
    rule = to_dict(config)["select"]
    return content | {"select": {name: rule[name] for name in ("rows", "max_new_tokens")}}


def _digest(config: SweepConfig, space: Space) -> str:
    content = _determining(config)
    base = {name: value for name, value in content["base"].items() if name not in WHERE_KEPT}
    export = {name: value for name, value in base.pop("export").items() if name not in EXPORT_PLACES}
    content["base"] = without_added(base if export == ADDED["export"] else base | {"export": export})
    kept = {name: value for name, value in content.items() if name not in (*WHERE_KEPT, "space_file")}
    text = json.dumps([kept, sweep_output.space_rows(space)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _begin(
    config: SweepConfig, space: Space, evaluator: Evaluator, storage: Path, folder: Path
) -> tuple[TrialLedger, dict[str, Any]]:
    """Data, references and the rule's numbers, computed once or read from the cache."""
    run, select = config.run, config.select
    data, tables = prepare("sweep", run, storage, folder, evaluator)
    rows = select.rows

    reference = reference_value(data, tables, rows, select.relative_to, select.utility)
    if reference is None:
        raise UserError(f"select.utility = {select.utility}: the {select.relative_to} model has no such metric")
    goal = goal_of(
        data,
        tables,
        objective=select.objective,
        utility=select.utility,
        floor=select.utility_floor * reference,
        rows=rows,
        longest=select.max_new_tokens,
        margin=select.margin * reference,
    )
    progress.note("select", f"best {select.objective} with {select.utility} >= {goal.floor:.4g} "
        f"({select.utility_floor:g} x {select.relative_to}: {reference:.4g})")  # fmt: skip
    ledger = TrialLedger(config, Search(config.search, space, run, goal, config.early.floor_share), data)
    ledger.read()
    if config.retry_failed:
        ledger.forget_failures()
    return ledger, _references(ledger, tables)


def _references(ledger: TrialLedger, tables: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the target and the retrained model on the rows that trials are judged on."""
    from ofmu_ray.evaluation.sample import RowSample

    sample = RowSample.of(ledger.data.evaluator.sets, ledger.config.select.rows)
    retrained = sample.cut(tables["retrained"])
    return {name: ledger.data.evaluator.metrics(sample.cut(table), retrained) for name, table in tables.items()}


def _run_trials(ledger: TrialLedger, handle: Any, at_once: int) -> bool:
    """Run all unfinished trials; True: all have finished now."""
    from ofmu_ray.search import tuner

    training, trials = ledger.config.base.training, ledger.config.search.trials
    local = training.single
    started, reported, listener = time.perf_counter(), set(), progress.current()
    before = sum(ledger.result(number) is not None for number in range(len(ledger.suggestions)))
    if before:
        progress.note("resume", f"{before} of {trials} trials have finished, {len(ledger.suggestions) - before} resume")

    def ended(number: int) -> None:
        if number in reported:
            return
        reported.add(number)
        sweep_output.log_child(ledger, number, handle)
        choice.prune_models(ledger)
        new = len(reported) - before
        left = trials - len(reported)
        eta = f", about {duration((time.perf_counter() - started) / new * left)} left" if new > 0 and left else ""
        listener.note("", f"[{len(reported)}/{trials}] trial {number}: {sweep_output.line(ledger, number)}{eta}")

    complete, exhausted = tuner.run(ledger, handle, at_once, ended, local=local)
    if exhausted:
        progress.note("search", f"the space contains only {len(ledger.suggestions)} different trials")
    for number in range(len(ledger.suggestions)):  # results written after Tune had moved on
        sweep_output.log_child(ledger, number, handle)
    choice.prune_models(ledger)
    return complete


def _confirm(ledger: TrialLedger, chosen: int) -> list[tuple[int, dict[str, Any]]]:
    """Run the chosen options on fresh seeds and all rows: metrics free of selection bias."""
    config = choice.best_config(ledger, chosen)
    trials = [
        Trial(
            method=ledger.config.label,
            split=ledger.data.name,
            phase="report",
            trial=chosen,
            config=replace(config, seed=seed),
            options=ledger.suggestions[chosen].options,
            budget_unit="",
            budget=0.0,
        )
        for seed in ledger.config.select.seeds
    ]
    if not trials:
        return []
    known = {trial.config.seed: read_result(ledger.folder, trial.key(ledger.data)) for trial in trials}
    if ledger.config.retry_failed:
        known |= {seed: None for seed, result in known.items() if result and result["status"] == "failed"}
    pool = Pool(config, {ledger.data.name: ledger.data}, ledger.config.concurrency)
    try:
        for trial, result in pool.run([trial for trial in trials if known[trial.config.seed] is None]):
            known[trial.config.seed] = result
            values = plain(result.get("figures") or {})
            goal = ledger.search.goal
            cells = [f"{n} {values[n]:.3g}" for n in (goal.objective, goal.utility) if values.get(n) is not None]
            progress.note("confirm", f"seed {trial.config.seed}: {', '.join(cells) or result.get('message', '')}")
    finally:
        pool.close()
    return [(seed, result) for seed, result in known.items() if result is not None]


def _discard(ledger: TrialLedger) -> None:
    """Delete everything that contains the forget rows' text, and what killed trials left behind."""
    unfinished = any(ledger.result(number) is None for number in range(len(ledger.suggestions)))
    for name in (PRIVATE, *(() if unfinished else ("work", "checkpoints"))):
        shutil.rmtree(ledger.folder / name, ignore_errors=True)
