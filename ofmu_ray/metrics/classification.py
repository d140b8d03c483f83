"""Metrics of image classifiers, as OPTML-Group/Unlearn-Saliency defines them (docs/metrics.md); in percent.

Columns by row: label and predicted (numbers of classes), confidence (softmax probability of the true class). Sets:
forget, retain, test (of class-wise forgetting: test rows of the other classes) and test_forgotten (those of the
forgotten classes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import MetricValue, mean_metric
from ofmu_ray.metrics.registry import NEEDS_RETRAINED, Group, Inputs, Metric, Values, register

MATCHED = ("unlearning_accuracy", "remaining_accuracy", "testing_accuracy", "mia_efficacy")
"""What should be near the retrained model's value; `average_gap` is the mean distance."""
ALIASES = {"retain_accuracy": "remaining_accuracy", "test_accuracy": "testing_accuracy"}
"""Second names in metrics.json -> the metrics; everything else uses the first names."""
_known: dict[str, NDArray[np.bool_]] = {}
_KEPT = 64


def right(rows: pa.Table, name: str) -> FloatArray:
    """100 for each row classified right, else 0 [rows]."""
    same = rows["predicted"].to_numpy() == rows["label"].to_numpy()
    return np.asarray(100.0 * same, dtype=np.float64)


def wrong(rows: pa.Table, name: str) -> FloatArray:
    """100 for each row classified wrong, else 0 [rows]."""
    return 100.0 - right(rows, name)


def called_non_members(retain: FloatArray, test: FloatArray, forget: FloatArray) -> NDArray[np.bool_]:
    """Which forget rows a classifier of confidences takes for rows that were not trained on, [forget].

    A support vector machine (RBF, C 3, gamma "auto") fitted on the confidences of the first n retain rows (members)
    and of the n test rows (others). [retain], [test], [forget].
    """
    from sklearn.svm import SVC

    key = hashlib.sha256(b"/".join(np.ascontiguousarray(part).tobytes() for part in (retain, test, forget))).hexdigest()
    if key not in _known:
        members = retain[: len(test)]
        values = np.concatenate([members, test])[:, None]
        truth = np.concatenate([np.ones(len(members)), np.zeros(len(test))])
        machine = SVC(C=3, gamma="auto", kernel="rbf").fit(values, truth)
        if len(_known) >= _KEPT:
            _known.clear()
        _known[key] = machine.predict(forget[:, None]) == 0
    return _known[key]


def mia_efficacy(inputs: Inputs) -> MetricValue:
    """Share of forget rows that look like rows that were not trained on, with the interval over forget rows."""
    sets = {name: inputs.rows(name) for name in ("retain", "test", "forget")}
    missing = [name for name, rows in sets.items() if not rows.num_rows]
    if missing:
        return MetricValue.absent(f"no {missing[0]} rows were evaluated (data.{missing[0]})")
    confidence = {name: rows["confidence"].to_numpy().astype(np.float64) for name, rows in sets.items()}
    broken = [name for name, values in confidence.items() if not np.isfinite(values).all()]
    if broken:
        return MetricValue.absent(f"the model's output is not finite on {broken[0]} rows")
    others = called_non_members(confidence["retain"], confidence["test"], confidence["forget"])
    return mean_metric(
        np.asarray(100.0 * others, dtype=np.float64), name="mia_efficacy", samples=inputs.samples, seed=inputs.seed
    )


def against_retrained(inputs: Inputs) -> Mapping[str, MetricValue]:
    """mia_efficacy and average_gap, which share the support vector machine."""
    own = mia_efficacy(inputs)
    results = {"mia_efficacy": own}
    if inputs.retrained is None:
        return results | {"average_gap": MetricValue.absent(NEEDS_RETRAINED)}
    other = Inputs(inputs.retrained, None, 1, inputs.seed)
    pairs = [(own, mia_efficacy(other))]
    for one in _MEANS[:3]:
        pairs.append((inputs.mean(one), other.mean(one)))
    reasons = [value.reason for pair in pairs for value in pair if value.value is None]
    if reasons:
        return results | {"average_gap": MetricValue.absent(str(reasons[0]))}
    gaps = [abs((one.value or 0.0) - (two.value or 0.0)) for one, two in pairs]
    reason = "a mean of four distances: no interval"
    return results | {"average_gap": MetricValue(float(np.mean(gaps)), n=own.n, reason=reason)}


def with_aliases(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one model as metrics.json holds them: those that have a second name under both."""
    return {**{alias: metrics[name] for alias, name in ALIASES.items() if name in metrics}, **metrics}


def confusion(rows: pa.Table, classes: int) -> NDArray[np.int64]:
    """How many rows of each class are predicted as each, int64 [true classes, predicted classes]."""
    places = rows["label"].to_numpy() * classes + rows["predicted"].to_numpy()
    return np.bincount(places, minlength=classes * classes).reshape(classes, classes)


def _mean(
    name: str, label: str, kept: str, values: Values, group: Group, alone: Literal["high", "low"], **more: Any
) -> Metric:
    return Metric(
        name=name, label=label, better="retrained", alone=alone, group=group, rows="images", set=kept, values=values,
        paired="mean", headline=True, **more,
    )  # fmt: skip


_MEANS = (
    _mean("unlearning_accuracy", "Unlearning accuracy (UA)", "forget", wrong, "Forgetting", "high", first=True),
    _mean("remaining_accuracy", "Remaining accuracy (RA)", "retain", right, "Utility", "high", first=True),
    _mean(
        "testing_accuracy", "Testing accuracy (TA)", "test", right, "Utility", "high", first=True,
        lead="percent of the test rows",
    ),
    _mean("forgotten_class_accuracy", "Test accuracy, forgotten class", "test_forgotten", right, "Forgetting", "low"),
)  # fmt: skip
register(
    Metric(
        name="average_gap", label="Average gap", better="low", group="Forgetting", rows="images",
        compute=against_retrained, needs=frozenset({"retrained"}), headline=True, first=True, span=100.0,
        lead="mean distance of UA, RA, TA and MIA from the retrained model's, in percentage points",
    ),
    *_MEANS,
    Metric(
        name="mia_efficacy", label="MIA efficacy", better="retrained", group="Membership inference", rows="images",
        compute=against_retrained, headline=True, first=True,
    ),
)  # fmt: skip
