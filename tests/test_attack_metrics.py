"""Metrics of the attacks' tables by hand, and how the page shows them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ofmu_ray.attacks.alignment import LayerAlignment, alignment_table
from ofmu_ray.attacks.attack_metrics import check_metrics
from ofmu_ray.metrics.intervals import MetricValue
from ofmu_ray.reporting.attack_tables import check_table
from ofmu_ray.reporting.evaluation_page import ComparisonData, grouped, render_comparison

SAMPLING = {"samples": 200, "seed": 0}


def table(values: dict[tuple[str, ...], list[float]], *columns: str, **more: list[Any]) -> pa.Table:
    """One row per value; the keys fill `columns`."""
    rows = [
        {**dict(zip(columns, key, strict=True)), "row_id": f"r-{n}", "cluster": None, "probability": value}
        for key, some in values.items()
        for n, value in enumerate(some)
    ]
    result = pa.Table.from_pylist(rows)
    for name, column in more.items():
        result = result.append_column(name, pa.array(column, pa.float64()))
    return result


def relearned(forget: list[list[float]]) -> pa.Table:
    """Rows [steps][rows] of the forget group at steps 0, 1, 3; the other groups do not change."""
    values = {
        (group, step): rows
        for group, curve in (("forget", forget), ("attacked", [[0.5, 0.5]] * 3), ("retain", [[0.9, 0.7]] * 3))
        for step, rows in zip((0, 1, 3), curve, strict=True)
    }
    return table(values, "group", "step")  # type: ignore[arg-type]


def test_relearning_curves_and_their_height() -> None:
    model = relearned([[0.0, 0.2], [0.4, 0.2], [0.8, 0.2]])
    reference = relearned([[0.0, 0.2], [0.0, 0.2], [0.0, 0.2]])
    metrics = check_metrics("relearn", model, reference, **SAMPLING)
    assert [metrics[f"forget/step_{step}"].value for step in (0, 1, 3)] == pytest.approx([0.1, 0.3, 0.5])
    # first row: (0 + 0.4) / 2 over one step and (0.4 + 0.8) / 2 over two, by 3 steps; the second is flat
    height = ((0.2 * 1 + 0.6 * 2) / 3 + 0.2) / 2
    assert metrics["forget/height"].value == pytest.approx(height)
    assert metrics["forget/height_beyond_retrained"].value == pytest.approx(height - 0.1)
    assert metrics["retain/height"].value == pytest.approx(0.8)
    assert metrics["retain/height_beyond_retrained"].value == 0
    assert metrics["forget/step_3"].n == 2
    assert "forget/height_beyond_retrained" not in check_metrics("relearn", model, None, **SAMPLING)


def test_rounded_weights_by_set_and_scheme() -> None:
    values = {("forget", "full"): [0.1, 0.3], ("forget", "rtn4"): [0.6, 0.8], ("retain", "full"): [0.9],
              ("retain", "rtn4"): [0.5]}  # fmt: skip
    metrics = check_metrics("quantise", table(values, "set", "scheme"), **SAMPLING)
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {"forget/full": 0.2, "forget/rtn4": 0.7, "retain/full": 0.9, "retain/rtn4": 0.5}
    )


def test_attacks_and_each_rows_worst_case() -> None:
    values = {("plain",): [0.1, 0.4], ("prefix_1",): [0.3, 0.2], ("hint",): [0.9, 0.9]}
    recall = [0.0, 1.0, 0.5, 0.0, 1.0, 1.0]
    metrics = check_metrics("prefix", table(values, "attack", rouge_l_recall=recall), **SAMPLING)
    assert metrics["probability/plain"].value == pytest.approx(0.25)
    assert metrics["probability/worst_case"].value == pytest.approx((0.3 + 0.4) / 2)  # without the hint
    assert metrics["rouge/prefix_1"].value == pytest.approx(0.25)
    assert metrics["rouge/worst_case"].value == pytest.approx((0.5 + 1.0) / 2)
    without = check_metrics("prefix", table(values, "attack", rouge_l_recall=[None] * 6), **SAMPLING)
    assert not [name for name in without if name.startswith("rouge")]


def test_clusters_are_drawn_as_units() -> None:
    rows = table({("forget", "full"): [0.0] * 5 + [1.0] * 5, ("retain", "full"): [0.5]}, "set", "scheme")
    labels = ["a"] * 5 + ["b"] * 5 + ["c"]
    rows = rows.set_column(rows.schema.get_field_index("cluster"), "cluster", pa.array(labels))
    metric = check_metrics("quantise", rows, **SAMPLING)["forget/full"]
    assert (metric.low, metric.value, metric.high, metric.clusters) == (0.0, 0.5, 1.0, 2)


def test_a_loss_that_is_not_finite_is_said() -> None:
    values = {("forget", "full"): [0.1, float("nan"), float("nan")], ("retain", "full"): [0.9]}
    metrics = check_metrics("quantise", table(values, "set", "scheme"), **SAMPLING)
    assert metrics["forget/full"].value is None
    assert "2 of 3" in str(metrics["forget/full"].reason)
    assert metrics["retain/full"].value == 0.9


def test_alignment_by_layer_and_its_mean() -> None:
    plain = [MetricValue(0.8, reason="no interval: x"), MetricValue(0.6, reason="no interval: x")]
    debiased = [MetricValue(0.5, 0.4, 0.6), MetricValue.absent("debiased CKA needs four rows")]
    cosine = [MetricValue(0.2, 0.1, 0.3), MetricValue(0.4, 0.3, 0.5)]
    rows = [LayerAlignment("forget", layer, plain[layer], debiased[layer], cosine[layer]) for layer in (0, 1)]
    metrics = check_metrics("alignment", alignment_table(rows), **SAMPLING)
    assert metrics["cka/forget/mean"].value == pytest.approx(0.7)
    assert metrics["cosine/forget/mean"].value == pytest.approx(0.3)
    assert metrics["cosine/forget/layer_1"] == MetricValue(0.4, 0.3, 0.5)
    assert metrics["cka_debiased/forget/mean"].value is None
    assert metrics["cka_debiased/forget/mean"].reason == "layer 1: debiased CKA needs four rows"


def test_names_become_words() -> None:
    value = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    names = {"forget/step_1": value, "forget/height_beyond_retrained": value, "retain/step_1": value}
    shown = check_table("relearn", {"target": names, "retrained": names}, ["target", "retrained"])
    assert [group.title for group in shown.groups] == [
        "Forget rows that it does not train on", "Retain rows that it does not train on",
    ]  # fmt: skip
    assert [row.label for row in shown.groups[0].rows] == ["step 1", "mean height beyond the retrained model's"]
    assert [row.direction for row in shown.groups[0].rows] == ["match retrained", "0"]
    alignment = {"cka/forget/mean": value, "cka/forget/layer_0": value}
    shown = check_table("alignment", {"target": alignment}, ["target", "retrained"])
    assert [(row.label, list(row.cells)) for row in shown.groups[0].rows] == [("forget rows", ["target"])]
    assert check_table("choice/bio", {"target": {"accuracy": value}}, ["target"]).title == "Multiple choice: bio"
    assert "prefix 2" in [
        row.label for row in check_table("prefix", {"t": {"rouge/prefix_2": value}}, ["t"]).groups[0].rows
    ]


def test_metrics_are_grouped_and_absent_ones_come_last() -> None:
    value = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    gone = {"value": None, "reason": "needs <a> model"}
    names = ("paraphrase_ks_statistic", "privleak", "mia_loss_auc", "retain_length", "forget_extraction_strength",
             "retain_rouge", "model_utility", "forget_rouge", "probes_utility_variance")  # fmt: skip
    metrics = {"one": dict.fromkeys(names, value) | {"forget_quality": gone, "ks_statistic": gone}, "two": {}}
    groups, absent = grouped(metrics)
    assert [group.title for group in groups] == [
        "Forgetting", "Utility", "Memorisation", "Generations", "Membership inference", "Probes",
    ]  # fmt: skip
    labels = [row.label for group in groups for row in group.rows]
    assert "Paraphrase KS distance to retrained" in labels
    assert "Loss AUC" in labels
    assert "Variance of utility over probes" in labels
    assert absent == [("needs <a> model", ["Forget quality", "KS distance to retrained"])]
    page = render_comparison(ComparisonData(title="t", metrics=metrics, models={"one": "a", "two": "b"}, tokenizers=2))
    assert page.index("Not measured") > page.index("Probes")
    assert "needs &lt;a&gt; model" in page
    assert "different tokenizers" in page
    assert np.all([f'data-model="{name}"' in page for name in ("one", "two")])
