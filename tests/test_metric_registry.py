"""A metric is one entry: everything that reads metrics reads its declaration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from contributing import added_to

from ofmu_ray.commandline.terminal import metrics_table
from ofmu_ray.errors import UserError
from ofmu_ray.metrics import registry
from ofmu_ray.metrics.columns import finite
from ofmu_ray.metrics.paired import Resamples, tested
from ofmu_ray.metrics.registry import Metric, metric, register
from ofmu_ray.metrics.rule import Goal, select
from ofmu_ray.metrics.summary import summarise
from ofmu_ray.reporting import page
from ofmu_ray.reporting.formats import metric_table
from ofmu_ray.tracking import description


@pytest.fixture
def verbosity() -> Iterator[Metric]:
    """The metric that CONTRIBUTING.md shows, by the code that it shows."""
    exec(added_to("ofmu_ray/metrics/generations.py"), {"register": register, "Metric": Metric, "finite": finite})
    yield metric("forget_verbosity")
    del registry._DECLARED["forget_verbosity"]


def table(*tokens: float) -> pa.Table:
    rows = range(len(tokens))
    return pa.table({
        "row_id": [f"forget-{row}" for row in rows], "set": ["forget"] * len(rows), "index": list(rows),
        "generated_tokens": list(tokens),
    })  # fmt: skip


def trials_with(name: str, *values: float) -> list[dict[str, Any]]:
    return [{"phase": "tune", "trial": n, name: value, "model_utility": 0.9} for n, value in enumerate(values)]


def test_one_entry_is_enough(verbosity: Metric) -> None:
    long, short = table(0.5, 0.7, 0.9), table(0.1, 0.1, 0.1)
    mean = summarise(long, bootstrap_samples=100)[verbosity.name]
    assert mean.value == pytest.approx(0.7)
    assert mean.low is not None
    assert mean.low < 0.7
    written = {"after": {verbosity.name: mean.to_json()}}
    (row,) = metric_table(written)
    assert (row.label, row.direction) == ("Forget verbosity", "↓ better")
    assert "Forget verbosity v" in metrics_table(written)
    assert [row["metric"] for row in page._headline(written)] == [verbosity]
    run = {"method": "npo", "rounds": 3, "status": "finished", "message": ""}
    assert description.headline(written | {"run": run}) == "`npo`, 3 rounds: finished · forget verbosity 0.7"
    choice = select(trials_with(verbosity.name, 0.7, 0.1), Goal(verbosity.name, "model_utility", 0.5))
    assert choice is not None
    assert choice.trial["trial"] == 1
    assert verbosity.name in tested()
    draws = Resamples(long).resampled_run(verbosity.name, short, None)
    assert not isinstance(draws, str)
    assert draws.value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("objective", "best"), [("retain_rouge", 0.9), ("ks_statistic", 0.1), ("forget_probability", 0.4)]
)
def test_the_rule_follows_the_direction(objective: str, best: float) -> None:
    """High, low, and near the retrained model (here 0.35)."""
    trials = trials_with(objective, 0.1, 0.4, 0.9)
    choice = select(trials, Goal(objective, "model_utility", 0.5, retrained_objective=0.35))
    assert choice is not None
    assert choice.trial[objective] == best


def test_what_attacks_measure_is_declared_too() -> None:
    """The first pattern that matches; what nobody declared has no better direction, and no rule compares by it."""
    better = {
        "relearn/forget/step_5": "retrained",
        "relearn/forget/height_beyond_retrained": "zero",
        "relearn/retain/height": "high",
        "quantise/forget/rtn4": "retrained",
        "prefix/probability/worst_case": "retrained",
        "alignment/cka/forget/mean": "high",
        "choice/accuracy": "depends",
        "something_new": "depends",
    }
    assert {name: metric(name).better for name in better} == better
    with pytest.raises(UserError, match="something_new: which way is better is not declared"):
        select(trials_with("something_new", 0.1, 0.4), Goal("something_new", "model_utility", 0.5))
    beyond = "relearn/forget/height_beyond_retrained"
    nearest = select(trials_with(beyond, -0.3, 0.1, 0.4), Goal(beyond, "model_utility", 0.5))
    assert nearest is not None
    assert nearest.trial["trial"] == 1


def test_the_margin_counts_where_some_trial_reaches_it() -> None:
    trials = [
        {"phase": "tune", "trial": 0, "forget_quality": 0.9, "model_utility": 0.80},
        {"phase": "tune", "trial": 1, "forget_quality": 0.5, "model_utility": 0.83},
    ]
    goal = Goal("forget_quality", "model_utility", 0.79)
    chosen = {margin: select(trials, replace(goal, margin=margin)) for margin in (0.0, 0.02, 0.1)}
    assert [choice.trial["trial"] for choice in chosen.values() if choice is not None] == [0, 1, 0]
    unmeasured = {"phase": "tune", "trial": 2, "forget_quality": None, "model_utility": 0.9}
    choice = select([trials[0], unmeasured], replace(goal, margin=0.02))  # it reaches the margin, but cannot be chosen
    assert choice is not None
    assert (choice.trial["trial"], choice.floor_missed) == (0, False)


def test_the_terminal_shows_each_metric_that_declares_it() -> None:
    shown = [one for one in registry.metrics() if one.headline]
    assert {one.better for one in shown} == {"high", "low", "zero", "retrained"}
    text = metrics_table({"after": {one.name: {"value": 0.25} for one in shown}})
    assert all(one.label in text for one in shown)
    assert "MUSE PrivLeak 0 " in text
    assert "   0 closest to 0   " in text
    assert "closest to 0" not in metrics_table({"after": {"model_utility": {"value": 0.25}}})


def test_families_are_spelled_out() -> None:
    assert metric("paraphrase_ks_statistic").label == "Paraphrase KS distance to retrained"
    assert metric("probes_utility_variance").label == "Variance of utility over probes"
    assert (metric("multihop_forget_quality").better, metric("multihop_forget_quality").p_value) == ("high", True)
    assert metric("mia_min_k_plus_auc").label == "Membership Min-K++ AUC"
    with pytest.raises(AssertionError, match="declared twice"):
        register(metric("forget_quality"))


@pytest.mark.parametrize(
    ("better", "span", "value", "expected"),
    [("high", 1.0, 0.7, 0.7), ("low", 100.0, 30.0, 0.7), ("zero", 1.0, -0.3, 0.7), ("retrained", 1.0, 0.2, 0.7),
     ("low", None, 0.3, None), ("depends", 1.0, 0.3, None)],
)  # fmt: skip
def test_a_score_is_1_where_the_metric_is_best(better: Any, span: float, value: float, expected: float | None) -> None:
    declared = Metric(name="x", label="X y", better=better, group="Forgetting", span=span)
    assert declared.score(value, 0.5) == (None if expected is None else pytest.approx(expected))
    assert declared.score(None, 0.5) is None


def test_words_of_scores() -> None:
    assert metric("ks_statistic").score_words == "1 − KS distance to retrained"
    assert metric("average_gap").score_words == "1 − average gap / 100"
    assert metric("forget_rouge").score_words == "1 − distance of forget ROUGE-L recall from retrained"
    assert metric("forget_rouge").score(0.2, None) is None
