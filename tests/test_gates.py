"""Gates decide by intervals: what passes, fails, is undecided or skipped, on tables made by hand. And recipes."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ofmu_ray.config import TrainingConfig, UnlearnConfig
from ofmu_ray.config.promotion import GateConfig, PromotionConfig, RecipeConfig
from ofmu_ray.config.requests import RequestOptions, RequestsConfig
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.rows import MEASURED, with_row_metrics
from ofmu_ray.metrics.intervals import MetricValue, difference_metric
from ofmu_ray.requests.gates import EARLIER, GateTables, check_gates, decide


def table(**sets: list[float]) -> pa.Table:
    """Rows with these answer probabilities, by set."""
    rows = []
    for name, probabilities in sets.items():
        for index, probability in enumerate(probabilities):
            row = dict.fromkeys(MEASURED.names)
            nll = -math.log(probability)
            row |= {"row_id": f"{name}-{index}", "set": name, "index": index, "answer_nll": nll, "answer_tokens": 5}
            row |= {"answer_logprobs": [-nll] * 5, "answer_zscores": [-nll] * 5, "answer_zlib_bytes": 20}
            row |= {"answer_matches": [probability > 0.5] * 5, "wrong_nll": []}
            rows.append(row)
    return with_row_metrics(pa.Table.from_pylist(rows, MEASURED))


LOW, HIGH = [0.1, 0.12, 0.11, 0.09] * 4, [0.9, 0.95, 0.92, 0.97] * 4
FORGOTTEN = GateConfig(metric="forget_probability", against="holdout", at_most=0.1)
KEPT = GateConfig(metric="retain_probability", against="champion", at_least=0.9)
PERSISTENT = GateConfig(metric="forget_probability", rows="earlier", against="holdout", at_most=0.2)


def results(gates: list[GateConfig], result: pa.Table, champion: pa.Table | None = None, **more: object) -> list[str]:
    tables = GateTables(result=result, champion=champion or result, samples=200, **more)
    return [one.result for one in decide(gates, tables)]


def test_the_whole_interval_must_keep_to_the_bound() -> None:
    assert results([FORGOTTEN], table(forget=LOW, holdout=LOW)) == ["passed"]
    assert results([FORGOTTEN], table(forget=HIGH, holdout=LOW)) == ["failed"]
    uneven = [0.05] * 15 + [0.95]  # its mean is below the bound, its interval reaches beyond it
    tables = GateTables(result=table(forget=uneven, holdout=LOW), champion=table(forget=LOW), samples=200)
    (gate,) = decide([FORGOTTEN], tables)
    assert gate.value < 0.1 < gate.high
    assert gate.result == "failed"
    assert gate.value == pytest.approx(np.mean(uneven) - np.mean(LOW))


def test_utility_is_a_ratio_on_the_same_rows() -> None:
    champion = table(forget=HIGH, retain=HIGH)
    assert results([KEPT], table(forget=LOW, retain=[0.95 * one for one in HIGH]), champion) == ["passed"]
    assert results([KEPT], table(forget=LOW, retain=[0.8 * one for one in HIGH]), champion) == ["failed"]
    tables = GateTables(result=table(retain=[0.5 * one for one in HIGH]), champion=champion, samples=200)
    (gate,) = decide([KEPT], tables)
    assert (gate.low, gate.value, gate.high) == pytest.approx((0.5, 0.5, 0.5))  # paired: rows do not matter


def test_one_row_is_undecided_and_what_rows_do_not_give_fails_or_is_skipped() -> None:
    assert results([FORGOTTEN], table(forget=LOW[:1], holdout=LOW)) == ["undecided"]
    ratios = {"metric": "forget_truth_ratio", "against": "holdout", "at_least": -0.1}
    gates = [GateConfig(**ratios), GateConfig(**ratios, if_absent="skip")]
    assert results(gates, table(forget=LOW, holdout=LOW)) == ["failed", "skipped"]


def test_an_attack_without_enough_rows_is_undecided() -> None:
    """As all else on one row. A failed gate would start the next recipe, for nothing."""
    gate = {"metric": "relearn/forget/step_5", "against": "holdout", "at_most": 0.25}
    gates = [GateConfig(**gate), GateConfig(**gate, if_absent="skip")]
    assert results(gates, table(forget=LOW[:1], holdout=LOW)) == ["undecided", "skipped"]


def test_one_earlier_request_that_comes_back_fails_alone() -> None:
    """Together with nine others it would not show."""
    earlier = LOW * 9 + HIGH[:4]
    names = [f"req-{index // 16}" for index in range(9 * 16)] + ["req-back"] * 4
    tables = GateTables(
        result=table(forget=LOW, holdout=LOW, **{EARLIER: earlier}), champion=table(forget=LOW), earlier=names,
        samples=200,
    )  # fmt: skip
    found = {one.name: one.result for one in decide([PERSISTENT], tables)}
    assert found.pop(f"{PERSISTENT.name}, request req-back") == "failed"
    assert set(found.values()) == {"passed"}
    assert len(found) == 10
    assert results([PERSISTENT], table(forget=LOW, holdout=LOW)) == ["skipped"]


def test_persistence_of_a_single_row_is_skipped_and_says_so() -> None:
    """All others were requested again. Undecided, it would send every batch to a person."""
    result = table(forget=LOW, holdout=LOW, **{EARLIER: LOW[:1]})
    (gate,) = decide([PERSISTENT], GateTables(result=result, champion=result, earlier=["req-1"], samples=200))
    assert gate.result == "skipped"
    assert gate.reason == "only one row of earlier requests is left, beside those of this batch"
    result = table(forget=LOW, holdout=LOW, **{EARLIER: HIGH[:2]})
    gates = decide([PERSISTENT], GateTables(result=result, champion=result, earlier=["a", "b"], samples=200))
    assert [one.result for one in gates] == ["failed"]


def test_membership_counts_earlier_rows_as_members() -> None:
    gate = GateConfig(metric="mia_loss_auc", rows="earlier", at_most=0.8)
    assert results([gate], table(forget=LOW, holdout=LOW, **{EARLIER: LOW}), earlier=["a"] * 16)[0] == "passed"
    assert results([gate], table(forget=LOW, holdout=LOW, **{EARLIER: HIGH}), earlier=["a"] * 16)[0] == "failed"


def test_rows_less_likely_than_unseen_ones_are_told_apart_too() -> None:
    """By default: over-forgotten rows are as easy to recognise as remembered ones."""
    (gate,) = (gate for gate in PromotionConfig().gates if gate.metric == "mia_min_k_auc")
    for forget, result in ((LOW, "passed"), (HIGH, "failed"), ([1e-6, 2e-6] * 8, "failed")):
        assert results([gate], table(forget=forget, holdout=LOW)) == [result]


def test_against_a_retrained_model_rows_are_paired() -> None:
    gate = GateConfig(metric="forget_probability", against="retrained", at_most=0.05, at_least=-0.05)
    near = [one + 0.01 for one in LOW]
    (done,) = decide(
        [gate], GateTables(result=table(forget=near), champion=table(forget=HIGH), retrained=table(forget=LOW))
    )
    assert (done.low, done.value, done.high) == pytest.approx((0.01, 0.01, 0.01))
    assert done.result == "passed"


def test_the_interval_of_a_difference() -> None:
    """MOVER: each side is the hypotenuse of the two intervals' halves that point there."""
    one, other = MetricValue(0.5, 0.4, 0.7, 10), MetricValue(0.2, 0.1, 0.24, 5)
    found = difference_metric(one, other)
    assert (found.value, found.low, found.high, found.n) == pytest.approx(
        (0.3, 0.3 - math.hypot(0.1, 0.04), 0.3 + math.hypot(0.2, 0.1), 15)
    )
    assert difference_metric(one, MetricValue.absent("why")).reason == "why"
    assert difference_metric(MetricValue(0.5, n=1, reason="one row"), other).low is None


def test_gates_that_cannot_be_decided_are_refused_at_the_start() -> None:
    with pytest.raises(UserError, match=r"data\.holdout"):
        check_gates([FORGOTTEN], holdout=False, retrained=False)
    with pytest.raises(UserError, match=r"evaluation\.retrained"):
        check_gates([GateConfig(metric="ks_statistic", at_most=0.3)], holdout=True, retrained=False)
    with pytest.raises(UserError, match="the champion is compared in"):
        check_gates([GateConfig(metric="forget_empty", against="champion", at_most=1)], holdout=True, retrained=False)
    with pytest.raises(UserError, match="no bound"):
        PromotionConfig(gates=[GateConfig(metric="model_utility")])
    with pytest.raises(UserError, match="once"):
        PromotionConfig(gates=[FORGOTTEN, FORGOTTEN])
    with pytest.raises(UserError, match=r"data\.forget\.path"):
        RecipeConfig(name="mine", options={"data.forget.path": "x"})
    check_gates(PromotionConfig().gates, holdout=True, retrained=False)


# ------------------------------------------------------------------------------------------------------------- recipes


def test_a_grid_is_a_recipe_for_each_combination() -> None:
    grid = {"ofmu.inner.lr": [1e-3, 2e-3], "training.rounds": [5, 9]}
    small = RecipeConfig(name="small", options={"ofmu": {"inner": {"lr": 1.0}}, "seed": 3}, grid=grid)
    promotion = PromotionConfig(recipes=[RecipeConfig(name="base"), small])
    assert [one.name for one in promotion.ladder] == ["base", "small-1", "small-2", "small-3", "small-4"]
    config = RequestsConfig(requests=RequestOptions(promotion=promotion))
    runs = [config.with_recipe(one) for one in promotion.ladder]
    values = [(one.ofmu.inner.lr, one.training.rounds, one.seed) for one in runs[1:]]
    assert values == [(1e-3, 5, 3), (1e-3, 9, 3), (2e-3, 5, 3), (2e-3, 9, 3)]
    assert runs[0] == UnlearnConfig()


@pytest.mark.parametrize(("rounds", "expected"), [(20, [20, 60, 120]), (100, [100, 300, 600])])
def test_the_default_recipes_train_longer_than_the_configuration(rounds: int, expected: list[int]) -> None:
    config = RequestsConfig(training=TrainingConfig(rounds=rounds))
    runs = [config.with_recipe(one) for one in config.requests.promotion.ladder]
    assert [one.training.rounds for one in runs] == expected
    assert [one.stop.forgotten for one in runs] == [3, None, None]


RECIPES_REFUSED = [
    ({"grid": {"ofmu.inner.lr": []}}, r"mine: grid\.ofmu\.inner\.lr = \[\]: must be a list of at least one value"),
    ({"grid": {"seed": [*range(5)], "training.rounds": [1, 2, 3, 4]}}, "combinations of grid = 20: must be at most 16"),
    ({"grid": {"ofmu.inner.lrs": [1.0]}}, r"mine-1: ofmu\.inner\.lrs\. Did you mean lr\?"),
    ({"grid": {"training.rounds": [4, 0]}}, r"training\.rounds = 0: must be greater than 0"),
    ({"grid": {"data.forget.path": ["x"]}}, r"mine: \.data\.forget\.path: set by the pipeline"),
    ({"rounds_factor": 0}, "mine.rounds_factor = 0: must be greater than 0"),
    ({"rounds_factor": 2, "options": {"training": {"rounds": 9}}}, "give one of them"),
    ({"rounds_factor": 2, "grid": {"training.rounds": [9]}}, "give one of them"),
]


@pytest.mark.parametrize(("options", "message"), RECIPES_REFUSED, ids=range(len(RECIPES_REFUSED)))
def test_recipes_that_cannot_run_are_refused_at_the_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RequestsConfig(
            requests=RequestOptions(promotion=PromotionConfig(recipes=[RecipeConfig(name="mine", **options)]))
        )


def test_two_recipes_of_a_name_are_refused() -> None:
    swept = RecipeConfig(name="mine", grid={"seed": [1, 2]})
    with pytest.raises(UserError, match=r"recipes = .mine-2.: must be there once"):
        PromotionConfig(recipes=[RecipeConfig(name="mine-2"), swept])
