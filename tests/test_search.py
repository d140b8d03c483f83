"""A sweep's options follow from seeds, numbers and results only, without hidden state."""

import json
import math
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.distributions import CategoricalDistribution

from ofmu_ray.config import SearchConfig, UnlearnConfig, apply_overrides
from ofmu_ray.metrics.degeneration import SoundRange
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.runs.trial import work_path
from ofmu_ray.search.priors import at
from ofmu_ray.search.spaces import ON, space_for
from ofmu_ray.search.suggest import EarlierTrial, Search, Suggestion, without_other_batches
from ofmu_ray.search.trial_ledger import TrialLedger
from tune_spaces import Choice, Integers, Knob, LogUniform, Space, Uniform, ZeroOrLogUniform

BASE = apply_overrides(UnlearnConfig(), {"ofmu.preset": "lite"})
GOAL = Goal("forget_quality", "model_utility", 0.5)
LITE = space_for("ofmu_lite", BASE)


def search(kind: str, space: Space = LITE, **options) -> Search:
    return Search(SearchConfig(kind=kind, **options), space, BASE, GOAL)


def ended(
    one: Suggestion, quality: float, utility: float = 0.6, status: str = "finished", stages: int = 1
) -> EarlierTrial:
    steps = [{"forget_quality": quality, "model_utility": utility}] * stages
    return EarlierTrial(one, status, steps, flops=1e9 * (1 + one.number))


def bowl(options) -> float:
    """A forget quality that is highest at inner.lr = 3e-5 and beta = 0."""
    return 10 ** -(3 * abs(math.log10(options["ofmu.inner.lr"] / 3e-5)) + 2 * (options["ofmu.beta"] > 0))


def searched(made: Search, trials: int, judge) -> list[EarlierTrial]:
    earlier: list[EarlierTrial] = []
    for number in range(trials):
        suggestion = made.suggest(number, earlier)
        assert suggestion is not None
        apply_overrides(BASE, suggestion.options)
        earlier.append(judge(suggestion))
    return earlier


@pytest.mark.parametrize("kind", ["tpe", "multi_objective"])
def test_the_estimator_knows_degenerate_trials(kind):
    goal = Goal("forget_quality", "model_utility", 0.5, sound=SoundRange("retrained", {"repetition": (0.0, 0.0, 0.05)}))
    made = Search(SearchConfig(kind=kind), LITE, BASE, goal)
    one = ended(made.suggest(0, []), 0.5)
    for repetition, violated in ((0.0, 0.0), (0.9, 1.0)):
        ends = {f"forget_repetition{end}": repetition for end in ("", "_low", "_high")}
        optuna_trial = made._optuna_trial(EarlierTrial(one.suggestion, "finished", [dict(one.metrics[0]) | ends]))
        assert max(0.0, *optuna_trial.constraints.values()) == violated


@pytest.mark.parametrize("kind", ["random", "tpe", "multi_objective"])
def test_a_restarted_search_continues_alike(kind):
    """After a kill, the new driver suggests what the old one would have suggested next."""

    def judge(one):
        return ended(one, bowl(one.options), status="stopped" if one.number % 3 == 2 else "finished")

    earlier = searched(search(kind, trials=8, startup_trials=3), 8, judge)
    for number in (2, 5, 7):
        assert search(kind, trials=8, startup_trials=3).suggest(number, earlier[:number]) == earlier[number].suggestion
    other = search(kind, trials=8, startup_trials=3, seed=1)
    assert other.suggest(0, []).options != earlier[0].suggestion.options


def test_more_trials_do_not_change_the_first_ones():
    few, many = search("random", trials=3), search("random", trials=30)
    assert [few.suggest(n, []).options for n in range(3)] == [many.suggest(n, []).options for n in range(3)]


@pytest.mark.slow
def test_the_estimator_looks_where_it_was_good():
    def late(kind):
        made = search(kind, trials=40, startup_trials=8)
        earlier = searched(made, 40, lambda one: ended(one, bowl(one.options)))
        return statistics.median(math.log10(bowl(one.suggestion.options)) for one in earlier[20:])

    assert late("tpe") > late("random") + 0.5


def test_the_estimator_heeds_the_floor():
    """The objective is best where utility is too low: only the constraint keeps the search away."""
    space = Space((Knob("ofmu.inner.lr", LogUniform(1e-6, 1e-2), ""),))

    def late(floor):
        goal = Goal("forget_quality", "model_utility", floor)
        made = Search(SearchConfig(trials=40, startup_trials=10), space, BASE, goal)

        def judge(one):
            rate = one.options["ofmu.inner.lr"]
            return ended(one, rate / 1e-2, utility=0.6 if rate < 1e-4 else 0.1)

        earlier = searched(made, 40, judge)
        return statistics.median(one.suggestion.options["ofmu.inner.lr"] for one in earlier[20:])

    assert late(None) > 1e-3
    assert late(0.5) < 3e-4


def test_running_and_failed_trials_are_no_obstacle():
    made = search("tpe", trials=9, startup_trials=2)
    earlier = searched(made, 4, lambda one: ended(one, 0.1))
    first, second = (
        made.suggest(4, earlier),
        made.suggest(5, [*earlier, EarlierTrial(made.suggest(4, earlier), "running")]),
    )
    failed = made.suggest(5, [*earlier, EarlierTrial(first, "failed")])
    assert first.options != second.options
    assert failed.options != first.options


def test_conditional_fields_are_omitted_and_reported_so():
    earlier = searched(search("tpe", trials=25, startup_trials=5), 25, lambda one: ended(one, bowl(one.options)))
    drawn = [one.suggestion.options for one in earlier]
    assert {(o["ofmu.rho"] > 0) == ("ofmu.rho_growth" in o) for o in drawn} == {True}
    assert {o["ofmu.rho"] > 0 for o in drawn} == {True, False}
    params, distributions = LITE.optuna_parameters({"ofmu.rho": 0.0, "ofmu.beta": 0.1})
    assert params == {"ofmu.rho" + ON: False, "ofmu.beta" + ON: True, "ofmu.beta": 0.1}
    assert set(params) == set(distributions)


def test_a_small_space_is_exhausted_not_repeated():
    space = Space((Knob("ofmu.inner_steps", Integers(1, 3), ""),))
    for kind in ("random", "tpe"):
        made = search(kind, space, trials=6, startup_trials=1)
        earlier = searched(made, 3, lambda one: ended(one, 0.1))
        assert {one.suggestion.options["ofmu.inner_steps"] for one in earlier} == {1, 2, 3}
        assert made.suggest(3, earlier) is None
        assert not made.waits(3, earlier)


# ------------------------------------------------------------------------------------------------------- population

MEMBERS = Space(
    (
        Knob("ofmu.inner.lr", LogUniform(1e-5, 1e-3), ""),
        Knob("ofmu.rho", ZeroOrLogUniform(1e-5, 1e-3), ""),
        Knob("ofmu.inner.decay", Choice(("constant", "linear")), ""),
        Knob("ofmu.rho_growth", Uniform(1.0, 1.1), "", given="ofmu.rho"),
    )
)


def test_the_worst_member_becomes_a_changed_copy_of_the_best():
    made = search("population", MEMBERS, trials=12, population=4)
    first = searched(made, 4, lambda one: ended(one, 0.1 * (one.number + 1), status="stopped"))
    second = [made.suggest(number, first) for number in range(4, 8)]
    assert [one.parent for one in second] == [3, 1, 2, 3]
    assert all(second[m].options == first[m].suggestion.options for m in (1, 2, 3))
    changed = second[0].options
    assert changed != first[3].suggestion.options
    for field, value in changed.items():
        prior = next(knob.prior for knob in MEMBERS.knobs if knob.field == field)
        if not isinstance(prior, CategoricalDistribution):
            assert value == 0 or at(prior, 0.0) <= value <= at(prior, 1 - 1e-9)
    assert made.suggest(4, first) == second[0]


def test_a_generation_waits_for_the_one_before():
    made = search("population", MEMBERS, trials=4, population=2)
    earlier = searched(made, 2, lambda one: EarlierTrial(one, "running"))
    assert made.suggest(2, earlier) is None
    assert made.waits(2, earlier)


def test_a_failed_member_is_replaced():
    made = search("population", MEMBERS, trials=4, population=2)
    earlier = searched(
        made, 2, lambda one: ended(one, 0.1, status="stopped") if one.number else EarlierTrial(one, "failed")
    )
    assert made.suggest(2, earlier).parent == 1


def test_members_continue_only_from_trials_that_left_weights():
    """Those that ended by themselves or failed left no checkpoint: copies of the others replace them."""
    made = search("population", MEMBERS, trials=8, population=4)
    status = ["failed", "finished", "stopped", "failed"]
    first = searched(made, 4, lambda one: ended(one, 0.9 - 0.1 * one.number, status=status[one.number]))
    second = [made.suggest(number, first) for number in range(4, 8)]
    assert [one.parent for one in second] == [2, 2, 2, 2]
    assert second[2].options == first[2].suggestion.options
    none = searched(made, 4, lambda one: EarlierTrial(one, "failed"))
    anew = [made.suggest(number, none) for number in range(4, 8)]
    assert [one.parent for one in anew] == [None] * 4
    assert not any(one.options in [other.suggestion.options for other in none] for one in anew)


def test_members_share_their_batches():
    space, dropped = without_other_batches(LITE, BASE)
    assert set(dropped) >= {"ofmu.inner_steps", "ofmu.outer_steps"}
    assert {knob.field for knob in space.knobs} >= {"ofmu.inner.lr", "ofmu.outer.lr", "ofmu.rho_growth"}
    assert without_other_batches(Space.of("npo"), apply_overrides(BASE, {"method": "npo"}))[1] == []


def test_a_trial_may_end_while_its_evaluations_are_read(tmp_path, monkeypatch):
    """Ended, it writes them into its result and deletes their files, here between a file's listing and its reading."""
    work, results, files = work_path(str(tmp_path), "key"), [], Path.glob
    (work / "stages").mkdir(parents=True)
    (work / "stages/0001.json").write_text(json.dumps({"stage": 1}))
    ledger = SimpleNamespace(
        folder=str(tmp_path), key=lambda _: "key", result=lambda _: results[0] if results else None
    )
    assert TrialLedger.evaluations(ledger, 0) == [{"stage": 1}]

    def listed(folder, pattern):
        yield from list(files(folder, pattern))
        results.append({"evaluations": [{"stage": 1}, {"stage": 2}]})
        shutil.rmtree(work)

    monkeypatch.setattr(Path, "glob", listed)
    assert TrialLedger.evaluations(ledger, 0) == [{"stage": 1}, {"stage": 2}]
