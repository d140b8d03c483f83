"""Metrics of image classifiers against cases made by hand and against scikit-learn directly."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.svm import SVC

from ofmu_ray.metrics.classification import called_non_members, confusion
from ofmu_ray.metrics.registry import metric
from ofmu_ray.metrics.summary import summarise

SETS = {"forget": 40, "retain": 90, "test": 60}


def table(seed: int, confident: dict[str, float]) -> pa.Table:
    """Rows of three classes; `confident`: mean confidence of each set."""
    rng = np.random.default_rng(seed)
    parts = []
    for name, rows in SETS.items():
        label = rng.integers(0, 3, rows)
        confidence = np.clip(rng.normal(confident[name], 0.15, rows), 0.01, 0.99)
        predicted = np.where(confidence > 0.5, label, (label + 1) % 3)
        ids = [f"{name}-{row}" for row in range(rows)]
        parts.append(
            pa.table(
                {
                    "row_id": ids,
                    "set": [name] * rows,
                    "label": pa.array(label, pa.int32()),
                    "predicted": pa.array(predicted, pa.int32()),
                    "confidence": confidence,
                }
            )
        )
    return pa.concat_tables(parts)


def column(rows: pa.Table, name: str, of: str) -> np.ndarray:
    pairs = zip(rows[of].to_pylist(), rows["set"].to_pylist(), strict=True)
    return np.array([value for value, part in pairs if part == name])


MODEL = table(0, {"forget": 0.6, "retain": 0.85, "test": 0.6})
RETRAINED = table(1, {"forget": 0.65, "retain": 0.9, "test": 0.65})


def efficacy(rows: pa.Table) -> float:
    """The reference code's steps, with scikit-learn alone."""
    retain, test, forget = (column(rows, name, "confidence") for name in ("retain", "test", "forget"))
    train = np.concatenate([retain[: len(test)], test]).reshape(-1, 1)
    labels = np.concatenate([np.ones(len(test)), np.zeros(len(test))])
    machine = SVC(C=3, gamma="auto", kernel="rbf").fit(train, labels)
    return 100 * float(np.mean(machine.predict(forget.reshape(-1, 1)) == 0))


def accuracy(rows: pa.Table, name: str) -> float:
    return 100 * accuracy_score(column(rows, name, "label"), column(rows, name, "predicted"))


def test_every_metric_against_scikit_learn() -> None:
    results = summarise(MODEL, RETRAINED, bootstrap_samples=50)
    expected = {
        "unlearning_accuracy": [100 - accuracy(rows, "forget") for rows in (MODEL, RETRAINED)],
        "remaining_accuracy": [accuracy(rows, "retain") for rows in (MODEL, RETRAINED)],
        "testing_accuracy": [accuracy(rows, "test") for rows in (MODEL, RETRAINED)],
        "mia_efficacy": [efficacy(rows) for rows in (MODEL, RETRAINED)],
    }
    assert set(results) == {*expected, "average_gap"}  # none of the metrics of texts, no forgotten class
    for name, (own, _) in expected.items():
        assert results[name].value == pytest.approx(own)
        assert metric(name).better == "retrained"
        assert results[name].low <= own <= results[name].high
    gap = np.mean([abs(own - other) for own, other in expected.values()])
    assert results["average_gap"].value == pytest.approx(gap)
    assert gap > 1
    assert metric("average_gap").better == "low"


def test_the_retrained_model_has_no_gap_to_itself_and_without_one_there_is_none() -> None:
    assert summarise(RETRAINED, RETRAINED, bootstrap_samples=5)["average_gap"].value == 0
    alone = summarise(MODEL, None, bootstrap_samples=5)
    assert alone["average_gap"].value is None
    assert "evaluation.retrained" in str(alone["average_gap"].reason)
    assert alone["mia_efficacy"].value is not None


def test_membership_by_hand() -> None:
    """Members are sure, others are not: a forget row is called by which of them it is like."""
    retain, test = np.full(30, 0.95), np.full(20, 0.2)
    called = called_non_members(retain, test, np.array([0.96, 0.18, 0.94, 0.21, 0.22]))
    assert called.tolist() == [False, True, False, True, True]
    # only the first n retain rows count, n the number of test rows: the others would turn the picture around
    misleading = np.concatenate([np.full(20, 0.95), np.full(500, 0.2)])
    assert called_non_members(misleading, test, np.array([0.2])).tolist() == [True]


def test_test_rows_of_a_forgotten_class_are_reported_apart() -> None:
    pairs = zip(MODEL["set"].to_pylist(), MODEL["label"].to_pylist(), strict=True)
    names = ["test_forgotten" if (name, label) == ("test", 2) else name for name, label in pairs]
    apart = MODEL.set_column(MODEL.schema.get_field_index("set"), "set", pa.array(names))
    results = summarise(apart, None, bootstrap_samples=5)
    others = accuracy_score(column(apart, "test", "label"), column(apart, "test", "predicted"))
    assert results["testing_accuracy"].value == pytest.approx(100 * others)
    forgotten = accuracy_score(column(apart, "test_forgotten", "label"), column(apart, "test_forgotten", "predicted"))
    assert results["forgotten_class_accuracy"].value == pytest.approx(100 * forgotten)


def test_a_missing_set_and_an_infinite_output_are_absent_with_the_reason() -> None:
    without = MODEL.filter(pa.array([name != "test" for name in MODEL["set"].to_pylist()]))
    assert "no test rows" in str(summarise(without, None, bootstrap_samples=5)["mia_efficacy"].reason)
    values = MODEL["confidence"].to_numpy().copy()
    values[0] = np.nan
    broken = MODEL.set_column(MODEL.schema.get_field_index("confidence"), "confidence", pa.array(values))
    assert "not finite on forget rows" in str(summarise(broken, None, bootstrap_samples=5)["mia_efficacy"].reason)


def test_confusion_is_scikit_learns() -> None:
    expected = confusion_matrix(MODEL["label"].to_numpy(), MODEL["predicted"].to_numpy(), labels=range(4))
    np.testing.assert_array_equal(confusion(MODEL, 4), expected)
