"""How far OFMU's bounded losses forget, as a number: from rows the model has never seen, or from token frequencies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ofmu_ray.config import ModelConfig
from ofmu_ray.data.prepare import Prepared
from ofmu_ray.features.reference import holdout_losses, unigram_entropy
from ofmu_ray.methods.ofmu import BOUNDED, OFMUConfig


def with_level(method: OFMUConfig, prepared: Prepared, model: ModelConfig, cache: str) -> OFMUConfig:
    """The options with `forget_level` as nats per token; those of unbounded losses as they are.

    That a level from holdout rows has such rows is checked when the configuration is built.

    Args:
        method: the options of the run's method.
        prepared: the run's streams, `holdout` among them where data.holdout is given.
        model: the model to change, before any step.
        cache: folder of the storage's caches.
    """
    if method.forget_loss not in BOUNDED:
        return method
    level = method.forget_level
    if level is None:
        level = "holdout" if "holdout" in prepared.streams else "unigram"
    if isinstance(level, str):
        level = _measured(level, prepared, model, cache)
    return replace(method, forget_level=float(level))


def _measured(level: str, prepared: Prepared, model: ModelConfig, cache: str) -> float:
    if level == "unigram":
        return unigram_entropy(prepared)
    losses = holdout_losses(prepared, model, cache)
    _, _, quantile = level.partition(":")
    return float(np.quantile(losses, float(quantile)) if quantile else losses.mean())
