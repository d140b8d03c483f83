"""OpenUnlearning's aggregate by hand, from per-row values."""

from __future__ import annotations

from statistics import harmonic_mean

import numpy as np
import pyarrow as pa
import pytest
from test_metrics_summary import SIZES, _table, _values

from ofmu_ray.metrics.aggregate import AGGREGATE, aggregate_inputs, aggregate_metrics, privacy_score
from ofmu_ray.metrics.intervals import MetricValue
from ofmu_ray.metrics.summary import summarise


def test_the_scores_by_hand() -> None:
    tables = [_table(seed, SIZES) for seed in (0, 1, 2)]
    model, target, retrained = (summarise(table, bootstrap_samples=2) for table in tables)
    aggregate = aggregate_metrics(*(aggregate_inputs(table) for table in tables))
    assert tuple(aggregate) == AGGREGATE
    paraphrase = np.mean([np.exp(-nll) for nll in _values(tables[0], "forget", "paraphrase_nll") if nll is not None])
    ratio = np.mean([1 / (1 + r) for r in _values(tables[0], "forget", "truth_ratio") if r is not None])
    memorised = [model[f"forget_{name}"].value for name in ("extraction_strength", "exact_memorisation")]
    scores = [harmonic_mean([1 - float(value) for value in (*memorised, paraphrase, ratio)])]
    attacks = [f"mia_{name}_auc" for name in ("loss", "zlib", "min_k", "min_k_plus")]
    scores.append(
        harmonic_mean([privacy_score(model[name].value or 0, retrained[name].value or 0) for name in attacks])
    )
    scores.append(min(1.0, (model["model_utility"].value or 0) / (target["model_utility"].value or 0)))
    assert [aggregate[name].value for name in AGGREGATE[1:]] == pytest.approx(scores)
    assert aggregate["aggregate"].value == pytest.approx(harmonic_mean(scores))


def test_an_attack_counts_by_its_distance_to_the_retrained_model() -> None:
    assert privacy_score(0.4, 0.4) == 1.0
    assert privacy_score(1.0, 0.4) == privacy_score(0.0, 0.4) == 0.0
    assert privacy_score(0.7, 0.4) == pytest.approx(0.5)
    assert privacy_score(0.2, 0.4) == pytest.approx(0.5)
    assert privacy_score(1.0, 1.0) == privacy_score(0.0, 0.0) == 1.0
    assert privacy_score(0.5, 1.0) == privacy_score(0.5, 0.0) == 0.5


def test_one_score_of_nothing_makes_it_nothing_and_what_is_missing_is_said() -> None:
    table = _table(0, SIZES)
    inputs = aggregate_inputs(table)
    known = inputs | {"forget_extraction_strength": MetricValue(1.0)}
    scores = aggregate_metrics(known, inputs, inputs)
    assert (scores["memorisation_score"].value, scores["aggregate"].value) == (0.0, 0.0)
    assert (scores["privacy_score"].value, scores["utility_score"].value) == (1.0, 1.0)
    alone = aggregate_metrics(inputs, inputs, aggregate_inputs(None))["aggregate"]
    assert alone.value is None
    assert "evaluation.retrained" in str(alone.reason)
    few = aggregate_inputs(_table(0, {name: size for name, size in SIZES.items() if name != "holdout"}))
    assert "evaluation.sets.holdout" in str(aggregate_metrics(few, inputs, inputs)["aggregate"].reason)


def test_images_have_no_aggregate() -> None:
    """Nothing is computed for them: a benchmark would fit a support vector machine for each run once more."""
    images = pa.table({"set": ["forget"] * 3, "predicted": [0, 1, 1], "confidence": [0.2, 0.5, 0.9]})
    assert aggregate_inputs(images) == {}
    absent = aggregate_metrics({}, {}, {})
    assert [absent[name].value for name in AGGREGATE] == [None] * len(AGGREGATE)
