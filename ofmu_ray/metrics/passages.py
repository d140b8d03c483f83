"""The loss of passages of documents (data.format.kind: text), where a probability of all their tokens says little."""

from __future__ import annotations

from ofmu_ray.metrics.columns import finite, of_texts
from ofmu_ray.metrics.registry import Metric, register

register(
    Metric(
        name="forget_loss", label="Forget loss (nats per token)", better="retrained", group="Forgetting", set="forget",
        values=lambda rows, name: finite(rows, name, "answer_nll"), only=of_texts, headline=True,
    ),
    Metric(
        name="retain_loss", label="Retain loss (nats per token)", better="low", group="Utility", set="retain",
        values=lambda rows, name: finite(rows, name, "answer_nll"), only=of_texts, headline=True,
    ),
)  # fmt: skip
