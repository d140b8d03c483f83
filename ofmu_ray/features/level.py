"""How far OFMU's bounded losses forget, as a number: from rows the model has never seen, or from token frequencies."""

from __future__ import annotations

import numpy as np

from ofmu_ray.config import ModelConfig
from ofmu_ray.data.prepare import PreparedData, spread
from ofmu_ray.features.reference import ChosenRows, stream_losses


def measured(level: str, prepared: PreparedData, model: ModelConfig, cache: str) -> float:
    """Nats per token that `ofmu.forget_level` names: holdout, holdout:QUANTILE or unigram.

    Args:
        level: the option.
        prepared: the run's streams, `holdout` among them where data.holdout is given.
        model: the model to change, before any step.
        cache: folder of the storage's caches.
    """
    if level == "unigram":
        return unigram_entropy(prepared)
    losses = stream_losses(prepared, "holdout", model, cache)
    _, _, quantile = level.partition(":")
    return float(np.quantile(losses, float(quantile)) if quantile else losses.mean())


def unigram_entropy(prepared: PreparedData, most: int = 10_000) -> float:
    """Entropy of the tokens of retain answers (nats), of at most `most` rows: the loss of who knows the vocabulary's
    frequencies and nothing else."""
    stream = prepared.streams["retain"]
    rows = ChosenRows(stream, spread(stream.rows, most)).rows
    tokens = np.concatenate([row["input_ids"][row["prompt_tokens"] :] for row in rows])
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log(share)).sum())
