"""How far OFMU's bounded losses forget: a level measured on rows the model never saw, or on token frequencies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig
from ofmu_ray.data.prepare import PreparedData
from ofmu_ray.errors import UserError
from ofmu_ray.features.reference import stream_losses
from ofmu_ray.features.value_tables import ChosenRows, Missing
from ofmu_ray.models.source import weights_folder


def measured(
    level: str,
    prepared: PreparedData,
    model: ModelConfig,
    cache: str,
    left: list[Missing] | None = None,
    other: str | None = None,
) -> float | None:
    """The value of `ofmu.forget_level` in nats per token: holdout, holdout:QUANTILE or unigram.

    Args:
        level: the option.
        prepared: the run's streams, including `holdout` if data.holdout is set.
        model: the model to change, before any step.
        cache: the storage's cache folder.
        left: receives the losses of holdout rows if the run's workers have to compute them; then there is no value yet.
        other: path of the model whose losses count; it is loaded whole, unless an earlier run left its losses in the
            cache. None: `model`.

    Raises:
        UserError: `other` has to be loaded and does not fit.
    """
    if level == "unigram":
        return unigram_entropy(prepared)
    reference = replace(model, path=other or model.path)
    held = _folder(reference.path) == _folder(model.path)  # by the workers
    try:
        losses = stream_losses(prepared, "holdout", reference, cache, left=left, by_workers=held)
    except UserError as error:
        if held:
            raise
        raise UserError(f"ofmu.level_model = {other!r}: {error}; or give ofmu.forget_level in nats per token") from None
    return None if losses is None else level_of(level, losses)


def _folder(model: str) -> Path:
    return weights_folder(resolve_builtin(model)).resolve()


def level_of(level: str, losses: np.ndarray) -> float:
    """holdout or holdout:QUANTILE of the mean token losses of rows."""
    _, _, quantile = level.partition(":")
    return float(np.quantile(losses, float(quantile)) if quantile else losses.mean())


def unigram_entropy(prepared: PreparedData, most: int = 10_000) -> float:
    """Entropy of the tokens of retain answers (nats) over at most `most` rows: the loss of a model that knows only the
    token (or class) frequencies."""
    stream = prepared.streams["retain"]
    rows = ChosenRows(stream, stream.spread(most), ["input_ids", "prompt_tokens", "label"]).rows
    images = "label" in rows[0]
    tokens = np.concatenate([[row["label"]] if images else row["input_ids"][row["prompt_tokens"] :] for row in rows])
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log(share)).sum())
