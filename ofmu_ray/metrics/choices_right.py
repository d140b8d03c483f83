"""Multiple choice on questions to forget and to keep: accuracy, and how far it is from chance."""

from __future__ import annotations

import pyarrow as pa

from ofmu_ray.metrics.columns import finite
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.registry import Metric, register


def correct(rows: pa.Table, name: str) -> FloatArray | str:
    """1 where the right choice was chosen, else 0."""
    return finite(rows, name, "correct")


def above_chance(rows: pa.Table, name: str) -> FloatArray | str:
    """`correct` minus 1 / number of choices: its mean is 0 for a model that guesses."""
    right, chance = finite(rows, name, "correct"), finite(rows, name, "chance")
    if isinstance(right, str) or isinstance(chance, str):
        return right if isinstance(right, str) else chance
    return right - chance


register(
    Metric(
        name="forget_choice_above_chance", label="Forget multiple choice, accuracy above chance", better="zero",
        group="Forgetting", set="forget_choice", values=above_chance, needs=frozenset({"forget_choice"}), headline=True,
        span=1.0,
    ),
    Metric(
        name="forget_choice_accuracy", label="Forget multiple-choice accuracy", better="retrained",
        group="Forgetting", set="forget_choice", values=correct, needs=frozenset({"forget_choice"}),
    ),
    Metric(
        name="retain_choice_accuracy", label="Retain multiple-choice accuracy", better="high",
        group="Utility", set="retain_choice", values=correct, needs=frozenset({"retain_choice"}), headline=True,
    ),
)  # fmt: skip
