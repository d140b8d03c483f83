"""Membership inference against scikit-learn, by hand and by its invariances."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from ofmu_ray.metrics import intervals, membership
from ofmu_ray.metrics.summary import summarise

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=25)


def _labels(forget: list[float], holdout: list[float]) -> list[int]:
    return [0] * len(forget) + [1] * len(holdout)


@given(SCORES, SCORES)
def test_auc_against_scikit_learn_and_pairs(forget: list[float], holdout: list[float]) -> None:
    auc = membership.attack_auc(forget, holdout)
    assert auc == pytest.approx(roc_auc_score(_labels(forget, holdout), forget + holdout))
    pairs = [(h > f) + 0.5 * (h == f) for f in forget for h in holdout]
    assert auc == pytest.approx(np.mean(pairs))


@given(SCORES, SCORES)
def test_auc_is_antisymmetric_and_sees_order_only(forget: list[float], holdout: list[float]) -> None:
    auc = membership.attack_auc(forget, holdout)
    assert membership.attack_auc(holdout, forget) == pytest.approx(1 - auc)
    assert membership.attack_auc(np.negative(holdout), np.negative(forget)) == pytest.approx(auc)
    assert membership.attack_auc(np.exp(forget), np.exp(holdout)) == pytest.approx(auc)
    assert membership.attack_auc(forget, forget) == pytest.approx(0.5)


@given(SCORES, SCORES, st.sampled_from([0.01, 0.1, 0.3]))
def test_tpr_against_scikit_learn(forget: list[float], holdout: list[float], limit: float) -> None:
    # there a member is the positive class and a high score its sign
    members = [1 - label for label in _labels(forget, holdout)]
    fpr, tpr, _ = roc_curve(members, np.negative(forget + holdout), drop_intermediate=False)
    rate = membership.tpr_at_fpr(forget, holdout, limit)
    assert rate == pytest.approx(tpr[fpr <= limit + 1e-12].max())
    assert rate <= membership.tpr_at_fpr(forget, holdout, 1.0) == 1.0


def test_rates_by_hand() -> None:
    holdout = np.arange(100, 200)
    assert membership.attack_auc([1, 2], holdout) == 1.0
    assert membership.attack_auc([500], holdout) == 0.0
    # below 101 is one holdout row in a hundred: allowed; below 102 are two: not allowed
    assert membership.tpr_at_fpr([99, 100.5, 101.5, 150], holdout) == 0.5
    assert membership.tpr_at_fpr([99, 100.5, 101.5, 150], holdout[:50]) == 0.25  # of 50, none may be


def test_scores_by_hand() -> None:
    text = "the answer is the answer is the answer"
    length = len(zlib.compress(text.encode()))
    assert membership.zlib_score([3.0], [length]) == pytest.approx([3.0 / length])
    assert membership.reference_score([3.0, 1.0], [1.0, 2.0]) == pytest.approx([2.0, -1.0])
    logprobs = [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert membership.min_k(logprobs) == pytest.approx(4.5)  # floor(0.4 * 5) = 2 tokens
    assert membership.min_k(logprobs, 0.2) == pytest.approx(5.0)
    assert membership.min_k([-1.0, -5.0]) == pytest.approx(5.0)  # at least one token
    assert math.isnan(membership.min_k([]))


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_min_k_by_definition(logprobs: list[float], share: float) -> None:
    lowest = sorted(logprobs)[: max(1, math.floor(share * len(logprobs)))]
    assert membership.min_k(logprobs, share) == pytest.approx(-sum(lowest) / len(lowest))
    assert membership.min_k(logprobs, share) >= membership.min_k(logprobs, 1.0) - 1e-9
    assert membership.min_k(logprobs[::-1], share) == pytest.approx(membership.min_k(logprobs, share))


def test_privleak_by_hand() -> None:
    assert membership.privleak(0.5, 0.5) == 0.0
    assert membership.privleak(1.0, 0.5) == -100.0
    assert membership.privleak(0.25, 0.5) == 50.0
    assert membership.privleak([0.6, 0.9], [0.6, 0.8]) == pytest.approx([0.0, -50.0])
    a, r = 0.7, 0.4  # as OpenUnlearning writes it, of the complementary AUCs
    assert membership.privleak(a, r) == pytest.approx(100 * ((1 - a) - (1 - r)) / (1 - r))
    assert np.isnan(membership.privleak(0.5, 1.0))


# ------------------------------------------------------------------------------------------------------ intervals


@settings(max_examples=25)
@given(SCORES, SCORES, st.integers(0, 1000))
def test_weighted_rates_are_those_of_repeated_rows(forget: list[float], holdout: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    members, others = rng.integers(0, 4, (3, len(forget))), rng.integers(0, 4, (3, len(holdout)))
    members[:, 0] += 1
    others[:, 0] += 1
    curve = membership.roc(forget, holdout, (members.astype(float), others.astype(float)))
    for draw, (area, rate) in enumerate(zip(membership.area(*curve), membership.best_rate(*curve), strict=True)):
        repeated = np.repeat(forget, members[draw]), np.repeat(holdout, others[draw])
        labels = _labels(list(repeated[0]), list(repeated[1]))
        assert area == pytest.approx(roc_auc_score(labels, np.concatenate(repeated)))
        assert rate == pytest.approx(membership.tpr_at_fpr(*repeated))


def test_interval_of_auc_has_the_known_width() -> None:
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(0, 1, 300), rng.normal(0.7, 1, 200)
    auc, rate = intervals.attack_metrics(forget, holdout, samples=1000, seed=0, name="mia")
    assert auc.value == pytest.approx(roc_auc_score(_labels(list(forget), list(holdout)), [*forget, *holdout]))
    assert auc.n == rate.n == 500
    # DeLong: variance of the placements of either set
    above = (holdout[None, :] > forget[:, None]).astype(float)
    deviation = math.sqrt(above.mean(axis=1).var(ddof=1) / 300 + above.mean(axis=0).var(ddof=1) / 200)
    assert auc.low is not None
    assert auc.high is not None
    assert auc.high - auc.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_privleak_keeps_a_rows_scores_together() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=80), rng.normal(size=60)
    same = intervals.privleak_metric(scores, scores, samples=50, seed=0, name="privleak")
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    moved = intervals.privleak_metric((scores[0] - 1, scores[1]), scores, samples=50, seed=0, name="privleak")
    assert moved.high is not None
    assert moved.high < 0
    apart = np.zeros(5), np.ones(5)
    assert "AUC is 1" in str(intervals.privleak_metric(scores, apart, samples=5, seed=0, name="x").reason)


@pytest.mark.parametrize("whose", ["model", "retrained model"])
def test_muse_attack_on_a_broken_model_is_absent_with_the_reason(whose: str) -> None:
    """A loss that is not a number would otherwise sort as unlikely: like a document that was never seen."""

    def documents(*broken: int) -> pa.Table:
        rng = np.random.default_rng(0)
        logprobs = [rng.normal(-2, 1, 20) + (math.nan if row in broken else 0.0) for row in range(12)]
        return pa.table(
            {
                "row_id": [f"row {row}" for row in range(12)],
                "set": ["forget_documents"] * 6 + ["holdout_documents"] * 6,
                "answer_nll": [-row.mean() for row in logprobs],
                "answer_logprobs": [row.tolist() for row in logprobs],
            }
        )

    tables = [documents(0, 1) if one == whose else documents() for one in ("model", "retrained model")]
    metrics = summarise(*tables, bootstrap_samples=20)
    reason = "the model's loss is not finite on 2 of 6 forget_documents rows"
    shown = reason if whose == "model" else f"retrained model: {reason}"
    assert (metrics["muse_privleak"].value, metrics["muse_privleak"].reason) == (None, shown)
    assert (metrics["muse_min_k_auc"].value is None) == (whose == "model")
