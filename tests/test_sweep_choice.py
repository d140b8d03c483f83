"""The rule on recorded results: choice, ties, nearest, front, kept models, priors for a second sweep."""

import json
from dataclasses import replace

import pytest
import yaml

from ofmu_ray import tracking
from ofmu_ray.config import ModelConfig, SweepConfig, TrackingConfig, UnlearnConfig, apply_overrides
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.degeneration import SoundRange
from ofmu_ray.metrics.fronts import plain
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.runs.claims import Claim
from ofmu_ray.runs.trial import SplitData, model_path, result_path, write_failure
from ofmu_ray.search import run_sweep
from ofmu_ray.search.choice import choose, export, priors, prune_models
from ofmu_ray.search.suggest import EarlierTrial, Search, Suggestion
from ofmu_ray.search.sweep_output import log_child, settings, summary
from ofmu_ray.search.trial_ledger import TrialLedger
from ofmu_ray.search.tuner import _LEDGERS, LedgerSearch, TrialRun, finished
from tune_spaces import ofmu_lite, parse_prior

GOAL = Goal("forget_quality", "model_utility", 0.5, sound=SoundRange("retrained", {"repetition": (0.0, 0.0, 0.05)}))
RATES = (1e-5, 2e-5, 3e-5, 5e-5, 8e-5, 4e-6)


def ledger_of(folder, trials, **select) -> TrialLedger:
    """Finished trials (forget quality, utility, FLOPs), and None for one that was stopped early."""
    config = apply_overrides(SweepConfig(name="s", storage=str(folder)), {"select": select, "keep_models": 2})
    search = Search(config.search, ofmu_lite.SPACE, UnlearnConfig(), GOAL)
    data = SplitData("sweep", str(folder), None, None, None, "of the test", ModelConfig())
    folder.mkdir(exist_ok=True)
    made = TrialLedger(config, search, data)
    for number, trial in enumerate(trials):
        rho = {"ofmu.rho": 0.0} if number % 2 else {"ofmu.rho": 1e-4, "ofmu.rho_growth": 1.05}
        options = {"ofmu.inner.lr": RATES[number], "ofmu.inner_steps": 2 + number % 3, "ofmu.inner.decay": "linear"}
        made.suggestions.append(Suggestion(number, options | rho))
        result = {"status": "stopped", "evaluations": [], "options": options, "flops": 1.0, "ended": 1.0}
        if trial is not None:
            quality, utility, flops, *repetition = trial
            metrics = {"forget_quality": {"value": quality}, "model_utility": {"value": utility}}
            for value in repetition:
                metrics["forget_repetition"] = {"value": value, "low": value - 0.02, "high": value + 0.02}
            result |= {"status": "finished", "figures": metrics, "flops": flops}
        path = result_path(folder, made.key(number))
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result))
        model_path(folder, made.key(number)).mkdir(parents=True)
    return made


TRIALS = [(0.1, 0.6, 5.0), (0.3, 0.55, 9.0), (0.9, 0.4, 1.0), None, (0.3, 0.52, 2.0)]


@pytest.mark.parametrize(("tie_break", "chosen"), [("cost", 4), ("order", 1)])
def test_the_best_objective_with_enough_utility(tmp_path, tie_break, chosen):
    outcome = choose(ledger_of(tmp_path, TRIALS, tie_break=tie_break))
    assert (outcome.chosen, outcome.nearest) == (chosen, None)
    assert outcome.front == [0, 1, 2]


def test_a_generation_that_ends_while_it_is_asked_for_does_not_end_the_sweep(tmp_path, monkeypatch):
    ledger = ledger_of(tmp_path, [None, None])
    options = {"search": {"kind": "population", "trials": 4, "population": 2}}
    ledger.config = apply_overrides(ledger.config, options)
    ledger.search = replace(ledger.search, config=ledger.config.search)
    monkeypatch.setitem(_LEDGERS, str(tmp_path), ledger)
    search = LedgerSearch(str(tmp_path))
    search.next = 2
    statuses = iter(["running"])

    def earlier():
        status = next(statuses, "stopped")
        return [EarlierTrial(one, status) for one in ledger.suggestions]

    monkeypatch.setattr(ledger, "earlier", earlier)
    assert search.suggest("first") is None
    assert search.suggest("again")["number"] == 2
    assert not search.exhausted


def test_without_enough_utility_the_nearest_is_named(tmp_path):
    outcome = choose(ledger_of(tmp_path, [(0.9, 0.2, 1.0), None, (0.1, 0.45, 1.0)]))
    assert (outcome.chosen, outcome.nearest, outcome.front) == (None, 2, [2, 0])
    assert choose(ledger_of(tmp_path / "none", [])).front == []


def test_degenerate_trials_are_not_chosen_and_on_no_front(tmp_path):
    loud, calm = (0.9, 0.7, 1.0, 0.8), (0.2, 0.6, 1.0, 0.01)
    outcome = choose(ledger_of(tmp_path / "two", [loud, calm]))
    assert (outcome.chosen, outcome.front) == (1, [1])
    outcome = choose(ledger_of(tmp_path / "one", [loud]))
    assert (outcome.chosen, outcome.nearest, outcome.front) == (None, 0, [])


def test_models_beyond_the_best_go(tmp_path):
    made = ledger_of(tmp_path, TRIALS)
    prune_models(made)
    kept = {path.name for path in (tmp_path / "models").iterdir()}
    assert kept == {made.key(1), made.key(4)}


def test_a_new_rule_may_choose_a_trial_whose_model_is_gone(tmp_path):
    """best.yaml then trains it again; the earlier choice's model must not stand beside it."""
    made = ledger_of(tmp_path, TRIALS)
    prune_models(made)
    (tmp_path / "best/model").mkdir(parents=True)
    judged = replace(made, search=replace(made.search, goal=replace(GOAL, floor=0.58)))
    outcome = choose(judged)
    assert outcome.chosen == 0
    export(judged, outcome, None)
    assert outcome.metrics is None
    assert not (tmp_path / "best").exists()
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["ofmu"]["inner"]["lr"] == RATES[0]
    chosen = settings(judged, outcome, {}, {}, [])["chosen"]
    assert (chosen["number"], chosen["model"], chosen["figures"]) == (0, None, None)
    assert "chosen: trial 0; its model was not kept" in summary(judged, outcome)


def test_priors_for_a_second_sweep_are_those_of_the_best(tmp_path):
    trials = [(0.5, 0.6, 1.0), (0.4, 0.6, 1.0), (0.3, 0.6, 1.0), (0.9, 0.1, 1.0), None, (1e-9, 0.6, 1.0)]
    made = ledger_of(tmp_path, trials)
    by_field = priors(made)
    assert by_field["ofmu.inner.lr"] == "loguniform(6.67e-06, 4.5e-05)"  # 1e-5 to 3e-5, and half as much again
    assert by_field["ofmu.inner_steps"] == "integer(1, 5)"
    assert by_field["ofmu.inner.decay"] == "choice(linear)"
    assert by_field["ofmu.rho"] == "zero_or_loguniform(6.67e-05, 0.00015)"
    assert by_field["ofmu.rho_growth"] == "uniform(1.05, 1.05)"
    second = made.search.space.with_priors({field: parse_prior(text) for field, text in by_field.items()})
    second.check(UnlearnConfig())
    assert priors(ledger_of(tmp_path / "few", trials[:2])) == {}


@pytest.mark.slow
def test_a_trial_whose_process_could_not_write_its_result_is_logged_once(tmp_path):
    made = ledger_of(tmp_path, TRIALS)
    write_failure(made.trial(0), made.data, "its process ended")
    parent = tracking.start(TrackingConfig(), str(tmp_path), "s", {}, {})
    marker = result_path(tmp_path, made.key(0)).with_suffix(".mlflow")
    log_child(made, 0, parent)
    assert marker.is_file()
    tracking.finish(parent, status="FINISHED")


@pytest.mark.parametrize("retry", [False, True])
def test_failed_fresh_seeds_are_repeated_if_asked_for(tmp_path, monkeypatch, retry):
    class Pool:
        def __init__(self, *_):
            pass

        def run(self, trials):
            return [(trial, {"status": "finished", "figures": {}}) for trial in trials]

        def close(self):
            pass

    monkeypatch.setattr(run_sweep, "Pool", Pool)
    made = ledger_of(tmp_path, TRIALS, seeds=[1, 2])
    made.config = replace(made.config, retry_failed=retry)
    written = []
    monkeypatch.setattr(run_sweep, "read_result", lambda folder, key: written.append(key) or {"status": "failed"})
    confirmed = run_sweep._confirm(made, 4)
    assert len(set(written)) == 2
    assert [result["status"] for _, result in confirmed] == ["finished" if retry else "failed"] * 2


def test_a_stopped_trial_is_reported_again_with_the_score_it_was_stopped_by(tmp_path):
    """The median rule averages what is reported: a resumed sweep must not average the score of a failure."""
    made = ledger_of(tmp_path, TRIALS)
    path = result_path(tmp_path, made.key(3))
    metrics = [{"forget_quality": {"value": value}, "model_utility": {"value": 0.6}} for value in (0.1, 0.2)]
    evaluations = [{"stage": stage, "figures": one} for stage, one in enumerate(metrics, start=1)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluations": evaluations}))
    again = TrialRun.__new__(TrialRun)
    again.ledger, again.number, again.stage, again.thread = made, 3, 0, None
    reports = [again.step() for _ in range(3)]
    assert [(one["stage"], one["done"]) for one in reports] == [(1, False), (2, False), (2, True)]
    assert reports[2]["score"] == reports[1]["score"] == GOAL.score(plain(metrics[1]), made.search.share)


def test_a_second_member_with_the_same_options_is_another_trial(tmp_path):
    """Members run side by side, each in the folder of its key."""
    made = ledger_of(tmp_path, TRIALS)
    before = [made.key(number) for number in range(5)]
    options = made.suggestions[1].options
    made.suggestions += [Suggestion(5, options), Suggestion(6, options, parent=1), Suggestion(7, options)]
    keys = [made.key(number) for number in range(8)]
    assert keys[:5] == before
    assert len(set(keys)) == 8


def test_a_sweep_with_fewer_trials_than_before_is_complete_without_the_rest(tmp_path):
    made = ledger_of(tmp_path, TRIALS)
    result_path(tmp_path, made.key(4)).unlink()
    complete = {
        trials: finished(replace(made, config=apply_overrides(made.config, {"search.trials": trials})), False)
        for trials in (3, 4, 5, 6)
    }
    assert complete == {3: True, 4: True, 5: False, 6: False}
    less = apply_overrides(made.config, {"search.trials": 6})
    made.suggestions.pop()
    assert finished(replace(made, config=less), exhausted=True)


def test_a_population_keeps_its_number_of_trials(tmp_path):
    """Its generations divide the rounds of every run: with more of them, no earlier trial could continue."""

    def claim(kind, trials):
        search = {"kind": kind, "trials": trials, "population": 2}
        config = apply_overrides(SweepConfig(name=kind, storage=str(tmp_path)), {"search": search})
        digest = run_sweep._digest(config, ofmu_lite.SPACE)
        return Claim(str(tmp_path / kind), "sweep", digest, run_sweep._determining(config))

    for kind in ("population", "random"):
        with claim(kind, 4).held():
            pass
    assert claim("random", 8).check()
    assert claim("population", 4).check()
    with pytest.raises(UserError, match=r"search\.trials = 4, now 8"):
        claim("population", 8).check()
