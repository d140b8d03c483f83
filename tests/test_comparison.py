"""The benchmark's statistics: the rule, paired tests against known truth, fronts and areas against brute force."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp, spearmanr, ttest_rel

from ofmu_ray.metrics.degeneration import SoundRange
from ofmu_ray.metrics.fronts import geometric_mean, hypervolume, pareto_front, sensitivity
from ofmu_ray.metrics.paired import PairedTest, ResampledRun, Resamples, holm, paired_test, verdicts
from ofmu_ray.metrics.registry import metric
from ofmu_ray.metrics.rule import Goal, select
from ofmu_ray.metrics.summary import summarise

# ------------------------------------------------------------------------------------------------------------- rule


def trial(number: int, quality: float | None, utility: float | None, **more: Any) -> dict[str, Any]:
    return {
        "phase": "tune", "trial": number, "forget_quality": quality, "model_utility": utility, "flops": 1e12, **more,
    }  # fmt: skip


def chosen(trials: list[dict[str, Any]], floor: float = 0.6) -> tuple[int, bool] | None:
    choice = select(trials, Goal("forget_quality", "model_utility", floor))
    return None if choice is None else (choice.trial["trial"], choice.floor_missed)


def test_the_best_objective_with_enough_utility_is_chosen() -> None:
    assert chosen([trial(0, 0.9, 0.5), trial(1, 0.3, 0.6), trial(2, 0.2, 0.7)]) == (1, False)


def test_ties_go_to_more_utility_then_to_the_cheaper_trial_then_to_the_lower_number() -> None:
    assert chosen([trial(0, 0.3, 0.6), trial(1, 0.3, 0.7, flops=2e12)]) == (1, False)
    assert chosen([trial(0, 0.3, 0.7, flops=2e12), trial(1, 0.3, 0.7)]) == (1, False)
    assert chosen([trial(1, 0.3, 0.7), trial(0, 0.3, 0.7)]) == (0, False)
    assert chosen([trial(0, 0.3, 0.7, flops=None), trial(1, 0.3, 0.7)]) == (1, False)


def test_without_enough_utility_the_nearest_to_the_floor_is_chosen_and_marked() -> None:
    assert chosen([trial(0, 0.9, 0.1), trial(1, 0.0, 0.59)]) == (1, True)
    assert chosen([trial(0, 0.1, 0.5), trial(1, 0.2, 0.5)]) == (1, True)


def test_only_tuning_trials_with_both_metrics_count() -> None:
    others = [trial(0, None, 0.9), trial(1, 0.9, None), trial(2, 0.9, float("nan")), trial(3, 0.9, 0.9, phase="report")]
    assert chosen(others) is None
    assert chosen([*others, trial(4, 0.1, 0.7)]) == (4, False)


@pytest.mark.parametrize(
    ("objective", "retrained", "values", "best"),
    [
        ("forget_quality", None, (0.1, 0.3, 0.2), 1),
        ("retain_probability", None, (0.1, 0.3, 0.2), 1),
        ("ks_statistic", None, (0.1, 0.3, 0.2), 0),
        ("forget_probability", 0.22, (0.1, 0.3, 0.2), 2),  # near the retrained model's, from either side
        ("forget_probability", 0.28, (0.1, 0.3, 0.2), 1),
        ("forget_probability", None, (0.1, 0.3, 0.2), 0),  # without one: as it declares
        ("unlearning_accuracy", None, (0.1, 0.3, 0.2), 1),
    ],
)
def test_the_objective_is_chosen_by_its_direction(
    objective: str, retrained: float | None, values: tuple[float, ...], best: int
) -> None:
    trials = [trial(number, None, 0.7) | {objective: value} for number, value in enumerate(values)]
    choice = select(trials, Goal(objective, "model_utility", 0.6, retrained))
    assert choice is not None
    assert choice.trial["trial"] == best


def babble(number: int, quality: float, utility: float, repetition: float) -> dict[str, Any]:
    ends = {"forget_repetition_low": repetition - 0.05, "forget_repetition_high": repetition + 0.05}
    return trial(number, quality, utility, forget_repetition=repetition, **ends)


def test_degenerate_trials_are_ranked_last_and_marked_when_there_are_no_others() -> None:
    goal = Goal(
        "forget_quality", "model_utility", 0.6, sound=SoundRange("retrained", {"repetition": (0.02, 0.0, 0.05)})
    )
    loud, sound, poor = babble(0, 0.9, 0.8, 0.7), babble(1, 0.2, 0.7, 0.05), babble(2, 0.5, 0.3, 0.02)
    for trials, number, missed, degenerate in (
        ([loud, sound, poor], 1, False, False),
        ([loud, poor], 2, True, False),  # not before one that merely misses the floor
        ([loud, babble(3, 0.95, 0.5, 0.8)], 0, False, True),
        ([babble(3, 0.95, 0.5, 0.8), babble(4, 0.1, 0.55, 0.8)], 4, True, True),
    ):
        choice = select(trials, goal)
        assert choice is not None
        assert (choice.trial["trial"], choice.floor_missed, choice.degenerate) == (number, missed, degenerate)
        ranks = [(goal.rank(one), -goal.score(one)) for one in trials]
        assert sorted(ranks) == sorted(ranks, key=lambda pair: pair[1])  # schedulers see the same order
    assert goal.degenerate(trial(5, 0.9, 0.9)) is None  # nothing was generated


def test_the_geometric_mean_of_p_values() -> None:
    assert geometric_mean([1e-8, 1e-2]) == pytest.approx(1e-5)
    assert geometric_mean([0.0, 0.5]) == 0.0


# ------------------------------------------------------------------------------------------------------- the plane

POINTS = st.lists(st.tuples(st.integers(-2, 8), st.integers(-2, 8)), max_size=12)


@given(POINTS)
def test_the_front_is_what_no_point_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(p: tuple[int, int]) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    front = pareto_front(points).tolist()
    assert sorted(front) == [index for index, point in enumerate(points) if not dominated(point)]
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


@given(POINTS, st.integers(-1, 3), st.integers(-1, 3))
def test_the_hypervolume_is_the_number_of_dominated_unit_squares(points: list[tuple[int, int]], x: int, y: int) -> None:
    squares = [(a, b) for a, b in product(range(-3, 9), repeat=2) if a >= x and b >= y]
    covered = sum(any(px >= a + 1 and py >= b + 1 for px, py in points) for a, b in squares)
    assert hypervolume(points, (x, y)) == pytest.approx(covered)


def test_the_hypervolume_against_monte_carlo() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((7, 2))
    darts = rng.random((200_000, 2))
    inside = (points[:, None, :] >= darts[None]).all(axis=2).any(axis=0).mean()
    assert hypervolume(points, (0, 0)) == pytest.approx(inside, abs=0.005)


# ------------------------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_covers_numeric_options_that_vary() -> None:
    rng = np.random.default_rng(0)
    trials = []
    for number in range(12):
        options = {
            "ofmu.beta": float(rng.random()), "ofmu.inner.lr": 1e-5 * (number + 1), "ofmu.rho": 0.1,
            "ofmu.preset": "full", "ofmu.reuse_retain_gradient": bool(number % 2), "ofmu.relative_step": None,
        }  # fmt: skip
        trials.append(trial(number, float(number), float(rng.random()), options=json.dumps(options)))
    trials.append(trial(12, None, 0.5, options=json.dumps({"ofmu.inner.lr": 1.0})))
    entries = {entry.option: entry for entry in sensitivity(trials, "forget_quality", "model_utility")}
    assert list(entries) == ["ofmu.beta", "ofmu.inner.lr"]
    assert entries["ofmu.inner.lr"].objective_correlation == pytest.approx(1.0)
    beta = entries["ofmu.beta"]
    assert len(beta.values) == 12
    assert beta.utility_correlation == pytest.approx(spearmanr(beta.values, beta.utility).statistic)


def test_two_trials_have_no_correlation() -> None:
    trials = [trial(number, 0.1 * number, 0.5, options=json.dumps({"npo.beta": number})) for number in range(2)]
    assert [entry.objective_correlation for entry in sensitivity(trials, "forget_quality", "model_utility")] == [None]


# ------------------------------------------------------------------------------------------------- metrics of draws

SIZES = {"forget": 60, "retain": 50, "real_authors": 20, "world_facts": 20}


def table(seed: int, shift: float = 0.0, noise: float = 0.05, persons: int | None = 20) -> pa.Table:
    """Row values around a shared base; `shift` moves the truth ratios (and the retain rows the other way)."""
    common, own = np.random.default_rng(99), np.random.default_rng(seed)
    parts = []
    for name, size in SIZES.items():
        level, moved = common.uniform(0.3, 0.7, size), shift if name == "forget" else -shift
        values = {
            column: np.clip(level + moved + noise * own.standard_normal(size), 0.01, 0.99)
            for column in ("probability", "rouge_l_recall", "truth_ratio")
        }
        clusters = [None if persons is None or name == "world_facts" else str(index % persons) for index in range(size)]
        parts.append(
            pa.table(
                {
                    "row_id": [f"{name}-{index}" for index in range(size)], "set": [name] * size,
                    "index": list(range(size)), "cluster": pa.array(clusters, pa.string()), **values,
                }
            )
        )  # fmt: skip
    return pa.concat_tables(parts)


@pytest.mark.parametrize("name", ["ks_statistic", "model_utility", "forget_truth_ratio", "retain_rouge"])
def test_metrics_of_draws_are_those_of_the_evaluation(name: str) -> None:
    model, retrained = table(1, 0.1), table(2)
    draws = Resamples(retrained, samples=50).resampled_run(name, model, retrained)
    assert isinstance(draws, ResampledRun)
    expected = summarise(model.append_column("answer_nll", pa.array(np.zeros(len(model)))), retrained)[name]
    assert draws.value == pytest.approx(expected.value, abs=1e-12)


def test_a_draw_takes_complete_clusters_and_both_models_at_once() -> None:
    model, retrained = table(1, 0.1), table(2)
    resamples = Resamples(retrained, samples=30, seed=4)
    weights = resamples.sets["forget"].weights
    assert resamples.sets["forget"].units == 20
    assert (weights[0] == 1).all()
    assert all(len(np.unique(weights[:, person::20], axis=1).T) == 1 for person in range(20))
    ratios = [np.array(source["truth_ratio"][:60].to_pylist()) for source in (model, retrained)]
    draws = resamples.resampled_run("ks_statistic", model, retrained)
    assert isinstance(draws, ResampledRun)
    for draw, weight in zip(draws.resampled, weights[1:].astype(int), strict=True):
        assert draw == pytest.approx(ks_2samp(*(np.repeat(values, weight) for values in ratios)).statistic)


def test_scores_are_turned_so_that_higher_is_better() -> None:
    retrained = table(2)
    resamples = Resamples(retrained, samples=20)
    near, far = (table(3, shift) for shift in (0.02, 0.3))
    for name in ("forget_quality", "forget_probability", "model_utility", "retain_probability"):
        one, two = (resamples.score(name, model, retrained) for model in (near, far))
        assert isinstance(one, ResampledRun)
        assert isinstance(two, ResampledRun)
        assert one.value > two.value
    perfect = resamples.score("forget_probability", retrained, retrained)
    assert isinstance(perfect, ResampledRun)
    assert perfect.value == 0
    alone = [resamples.score("forget_probability", model, None) for model in (near, far)]
    assert [one.value for one in alone if isinstance(one, ResampledRun)] == pytest.approx(
        [-np.mean(model["probability"].to_numpy()[:60]) for model in (near, far)]
    )
    assert "needs a model trained without" in str(resamples.score("forget_truth_ratio", near, None))


def test_what_cannot_be_computed_says_why() -> None:
    retrained, model = table(2), table(1)
    resamples = Resamples(retrained, samples=20)
    assert resamples.resampled_run("forget_quality", model, None) == "there is no retrained model"
    assert (
        resamples.resampled_run("retain_rouge", model.slice(0, 70), None)
        == "its retain rows differ from the rest of the split"
    )
    assert resamples.resampled_run("retain_rouge", model.slice(0, 60), None) == "no retain rows"
    assert resamples.resampled_run("model_utility", model.drop_columns("rouge_l_recall"), None) == (
        "the rows of retain were evaluated without rouge_l_recall"
    )
    assert resamples.resampled_run("aggregate", model, retrained) == "aggregate is not a mean over rows"
    assert resamples.resampled_run("muse_verbatim", model, retrained) == "no forget_verbatim rows"


def test_every_mean_over_rows_has_draws() -> None:
    """Rows of MUSE too, and with them its paired tests."""
    columns = {"row_id": ["a", "b", "c"], "set": ["forget_verbatim"] * 3, "index": [0, 1, 2]}
    one = pa.table({**columns, "rouge_l_f": [0.1, 0.2, 0.6]})
    draws = Resamples(one, samples=20).score("muse_verbatim", one, pa.table({**columns, "rouge_l_f": [0.2, 0.2, 0.2]}))
    assert isinstance(draws, ResampledRun)
    assert (draws.value, draws.units, len(draws.resampled)) == (pytest.approx(-10.0), 3, 20)


# ------------------------------------------------------------------------------------------------------------ tests


def test_a_method_that_is_better_on_the_common_seeds_is_not_worse() -> None:
    """Its mean is lower because of a seed that the best method lacks."""
    values = {"best": {1: 0.90, 2: 0.91}, "other": {1: 0.95, 2: 0.961, 3: 0.2}}
    scores = {m: {seed: ResampledRun(value, np.empty(0)) for seed, value in v.items()} for m, v in values.items()}
    verdict = verdicts(scores)["other"]
    assert verdict.test is not None
    assert verdict.test.difference < 0
    assert verdict.p_adjusted is not None
    assert verdict.p_adjusted < 0.05
    assert verdict.result == "not significantly worse"


def seeds_only(*values: float) -> dict[int, ResampledRun]:
    return {seed: ResampledRun(value, np.empty(0)) for seed, value in enumerate(values)}


def test_over_seeds_alone_it_is_the_paired_t_test() -> None:
    a, b = [0.5, 0.7, 0.65, 0.6], [0.45, 0.66, 0.5, 0.61]
    test = paired_test(seeds_only(*a), seeds_only(*b))
    assert test is not None
    assert test.p_value == pytest.approx(ttest_rel(a, b).pvalue)
    interval = ttest_rel(a, b).confidence_interval()
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high))
    assert test.covers == "seeds only"


def test_over_rows_alone_it_is_nearly_the_paired_t_test_of_rows() -> None:
    rng = np.random.default_rng(0)
    weights = np.concatenate([np.ones((1, 80)), rng.multinomial(80, np.full(80, 1 / 80), 4000)])
    a, b = rng.random(80), rng.random(80) + 0.1
    one, two = ({7: ResampledRun(v.mean(), (weights @ v / 80)[1:], 80)} for v in (a, b))
    test = paired_test(one, two)
    assert test is not None
    assert test.p_value == pytest.approx(ttest_rel(a, b).pvalue, rel=0.2)
    assert (test.covers, test.seeds) == ("rows only", 1)


def test_what_a_paired_test_does_with_little() -> None:
    assert paired_test(seeds_only(0.5), {9: ResampledRun(0.5, np.empty(0))}) is None
    assert paired_test(seeds_only(0.5), seeds_only(0.4)) == PairedTest(
        pytest.approx(0.1), None, None, None, 1, "nothing"
    )
    same = paired_test(seeds_only(0.5, 0.6), seeds_only(0.5, 0.6))
    assert same is not None
    assert same.p_value == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A claim's adjusted p: the largest Bonferroni p over all sets of hypotheses that contain it."""
    n = len(p_values)
    subsets = [[i for i in range(n) if mask >> i & 1] for mask in range(1, 2**n)]
    for index, adjusted in enumerate(holm(p_values)):
        closed = max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets if index in s)
        assert adjusted == pytest.approx(closed)


def scores(shifts: dict[str, float], name: str = "ks_statistic", seeds: int = 3) -> dict[str, dict[int, ResampledRun]]:
    retrained = table(0)
    resamples = Resamples(retrained, samples=400)
    by_method: dict[str, dict[int, ResampledRun]] = {}
    for number, (method, shift) in enumerate(shifts.items()):
        for seed in range(seeds):
            draws = resamples.score(name, table(100 * number + seed + 1, shift), retrained)
            assert isinstance(draws, ResampledRun)
            by_method.setdefault(method, {})[seed] = draws
    return by_method


def test_the_method_that_is_better_by_construction_is_marked_and_its_equal_too() -> None:
    results = verdicts(scores({"far": 0.15, "good": 0.0, "equal": 0.0, "farther": 0.3}))
    assert {results["good"].result, results["equal"].result} == {"best", "not significantly worse"}
    assert results["far"].result == results["farther"].result == "worse"
    assert results["farther"].test is not None
    assert results["farther"].test.covers == "rows and seeds"
    assert results["farther"].test.difference > results["far"].test.difference > 0  # type: ignore[union-attr]
    assert results["farther"].test.low > 0  # type: ignore[operator]


def test_a_method_below_the_floor_is_never_best() -> None:
    results = verdicts(scores({"good": 0.0, "far": 0.15}), barred={"good": "below the utility floor"})
    assert {method: verdict.result for method, verdict in results.items()} == {
        "good": "below the utility floor",
        "far": "best",
    }
    assert metric("forget_quality").forgetting
    assert metric("ks_statistic").forgetting
    assert not metric("model_utility").forgetting


def test_equal_methods_are_rarely_called_different() -> None:
    """Family-wise error of at most about 5 % if both rows and seeds vary."""
    rng = np.random.default_rng(0)
    false_claims = 0
    for _ in range(100):
        weights = rng.multinomial(50, np.full(50, 1 / 50), 200)
        models = [rng.normal(0, 0.1, 50) + rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.05, (3, 50)) for _ in range(4)]
        family = {
            str(name): {seed: ResampledRun(rows.mean(), weights @ rows / 50, 50) for seed, rows in enumerate(model)}
            for name, model in enumerate(models)
        }
        false_claims += any(verdict.result == "worse" for verdict in verdicts(family).values())
    assert false_claims <= 10


def test_a_single_seed_without_rows_is_not_tested() -> None:
    results = verdicts({"a": seeds_only(0.5), "b": seeds_only(0.4), "c": {}})
    assert {method: verdict.result for method, verdict in results.items()} == {"a": "best", "b": "not tested"}
