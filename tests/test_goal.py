"""The rule's numeric scores: they order trials like selection by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofmu_ray.config import EvaluationConfig, UnlearnConfig
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.registry import metric
from ofmu_ray.metrics.rule import FAILED, Goal
from ofmu_ray.runs.trial_data import checked

finite = st.floats(-1e3, 1e3, allow_nan=False)


def test_directions_of_metrics():
    assert {metric(name).better for name in ("forget_quality", "model_utility", "retain_probability")} == {"high"}
    assert metric("ks_statistic").better == "low"
    assert {metric(name).better for name in ("forget_probability", "mia_loss_auc")} == {"retrained"}
    assert {metric(name).better for name in ("privleak", "muse_privleak")} == {"zero"}  # one formula


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=6), finite)
def test_the_score_orders_trials_as_the_rule_does(points, floor):
    """Enough utility before too little; then by objective, or by the missing utility."""
    goal = Goal("ks_statistic", "model_utility", floor)
    rows = [{"ks_statistic": objective, "model_utility": utility} for objective, utility in points]
    for a, b in itertools.permutations(rows, 2):
        enough_a, enough_b = a["model_utility"] >= floor, b["model_utility"] >= floor
        if enough_a != enough_b:
            better = enough_a
        elif enough_a:
            better = a["ks_statistic"] < b["ks_statistic"] - 1e-6 * (1 + abs(b["ks_statistic"]))
        else:
            better = a["model_utility"] > b["model_utility"] + 1e-6 * (1 + abs(b["model_utility"]))
        if better:
            assert goal.score(a) > goal.score(b)
    assert all(FAILED < goal.score(row) <= 1 for row in rows)


def test_on_the_way_a_share_of_the_floor_is_enough():
    goal = Goal("forget_quality", "model_utility", 0.8)
    dipped = {"forget_quality": 0.1, "model_utility": 0.65}
    assert goal.score(dipped) < 0 < goal.score(dipped, share=0.75)
    assert goal.score({"forget_quality": 0.1, "model_utility": 0.55}, share=0.75) < 0


def test_p_values_count_by_their_logarithm():
    goal = Goal("forget_quality", "model_utility", None)
    scores = [goal.score({"forget_quality": p, "model_utility": 0.5}) for p in (0.0, 1e-200, 1e-20, 1e-3, 1.0)]
    assert scores == sorted(scores)
    assert scores[0] == pytest.approx(0.0)
    assert scores[-1] == 1.0
    assert scores[3] - scores[2] == pytest.approx(17 / 300)


def test_a_metric_that_should_match_the_retrained_model():
    matching = Goal("forget_probability", "model_utility", 0.5, retrained_objective=0.2)
    low = Goal("forget_probability", "model_utility", 0.5)
    near, none = ({"forget_probability": value, "model_utility": 0.6} for value in (0.25, 0.0))
    assert matching.score(near) > matching.score(none)
    assert low.score(none) > low.score(near)
    assert matching.goodness(near) == pytest.approx(-0.05)


@pytest.mark.parametrize("name", ["forget_loss", "forget_truth_ratio", "forget_repetition", "mia_loss_auc"])
def test_what_should_match_the_retrained_model_is_no_objective_without_one(name, tmp_path):
    """The lowest forget loss is that of the model that forgets least."""
    config = UnlearnConfig(evaluation=EvaluationConfig(retrained=None))
    with pytest.raises(UserError, match=f"rule.objective = {name} should match .*: name evaluation.retrained"):
        checked(config, tmp_path, {"rule.objective": name}, ("tuning.max_new_tokens", 8))
    with pytest.raises(UserError, match=f"{name}: .*evaluation.retrained.*, or choose another objective"):
        Goal(name, "model_utility", 0.5).goodness({name: 0.1})
    assert Goal(name, "model_utility", 0.5, retrained_objective=0.3).goodness({name: 0.1}) == pytest.approx(-0.2)


@pytest.mark.parametrize("metrics", [{}, {"forget_quality": 0.1}, {"forget_quality": math.nan, "model_utility": 1.0}])
def test_without_metrics_a_trial_has_failed(metrics):
    assert Goal("forget_quality", "model_utility", 0.5).score(metrics) == FAILED


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("rule.objective", "aggregate", "a run does not measure it"),
        ("rule.objective", "average_gap", "a run does not measure it"),
        ("rule.utility", "relearn/retain/height_beyond_retrained", "a run does not measure it"),
        ("rule.utility", "retain_loss", "the floor is for a metric that should be high"),
        ("rule.utility", "forget_probability", "the floor is for a metric that should be high"),
    ],
)
def test_a_rule_by_what_no_run_gives_is_refused_before_any_run(option, name, message, tmp_path):
    required = {"rule.objective": "forget_quality", "rule.utility": "model_utility"} | {option: name}
    with pytest.raises(UserError, match=f"{option} = {name}: {message}"):
        checked(UnlearnConfig(), tmp_path, required, ("tuning.max_new_tokens", None))
