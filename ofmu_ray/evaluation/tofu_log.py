"""Compute metrics from an evaluation log in the TOFU release's format (locuslab/tofu), without running a model.

A log is a JSON object with four parts; each part maps a quantity to {row index: value}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ofmu_ray.errors import UserError
from ofmu_ray.metrics import functions as metrics
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.rouge import rouge_l_recall

Log = Mapping[str, Any]

PARTS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
_OPTION_SETS = ("real_authors", "world_facts")


@dataclass(frozen=True)
class _Rows:
    """The per-row values of one part, in the order of its row indices."""

    nll: FloatArray
    ratio_nll: FloatArray
    wrong_nll: FloatArray
    rouge: FloatArray


def load_log(path: str | Path) -> dict[str, Any]:
    """The log from a file. Raises UserError if the file is missing or is not a JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            log = json.load(file)
    except OSError as error:
        raise UserError(f"cannot read the log {path}: {error.strerror}; give a file in the TOFU log format") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): give an evaluation log in the TOFU log format") from None
    if not isinstance(log, dict):
        kind = type(log).__name__
        raise UserError(f"{path} contains a {kind}, not an object with the parts {_quoted(PARTS.values())}")
    return log


def tofu_metrics(log: Log, retrained_log: Log | None = None, *, name: str = "the log") -> dict[str, float | None]:
    """The twelve components, model utility and forget quality of a log, under the names of `metrics.json`.

    Without the log of a retrained model, `forget_quality` and `ks_statistic` are None. Raises UserError (starting with
    `name`) if a part, a quantity or a row is missing or is not a finite number.
    """
    parts = {part: _rows(log, part, name) for part in PARTS}
    values: dict[str, float | None] = {}
    utility: list[float] = []
    for part, rows in parts.items():
        options = part in _OPTION_SETS
        prob = metrics.options_probability(rows.nll, rows.wrong_nll) if options else metrics.probability(rows.nll)
        ratio = metrics.truth_ratio(rows.ratio_nll, rows.wrong_nll)
        score = metrics.closer_to_1(ratio) if part == "forget" else metrics.true_better(ratio)
        three = [float(np.mean(column)) for column in (prob, rows.rouge, score)]
        values.update(zip((f"{part}_probability", f"{part}_rouge", f"{part}_truth_ratio"), three, strict=True))
        utility += [] if part == "forget" else three
    quality: tuple[float, float] | tuple[None, None] = (None, None)
    if retrained_log is not None:
        reference = _rows(retrained_log, "forget", "the retrained model's log")
        own = parts["forget"]
        quality = metrics.forget_quality(
            metrics.truth_ratio(own.ratio_nll, own.wrong_nll),
            metrics.truth_ratio(reference.ratio_nll, reference.wrong_nll),
        )
    utility_value = float(metrics.model_utility(utility))
    return {"forget_quality": quality[0], "ks_statistic": quality[1], "model_utility": utility_value, **values}


def recomputed_rouge(log: Log, *, name: str = "the log") -> dict[str, list[float]]:
    """Set -> ROUGE-L recall of each stored generation against its stored reference, in the log's row order.

    Raises UserError if a part has no generations or a row is not [prompt, generated, reference].
    """
    scores = {}
    for part, key in PARTS.items():
        generations = _quantity(log, part, "generated_text", name)
        for row, texts in generations.items():
            if not (isinstance(texts, list) and len(texts) == 3 and all(isinstance(text, str) for text in texts)):
                raise UserError(f"{name}: {key}/generated_text row {row} is not [prompt, generated, reference]")
        triples = list(generations.values())
        scores[part] = rouge_l_recall([reference for *_, reference in triples], [text for _, text, _ in triples])
    return scores


def _rows(log: Log, part: str, name: str) -> _Rows:
    key = PARTS[part]
    losses = _quantity(log, part, "avg_gt_loss", name)
    indices = list(losses)

    def column(quantity: str) -> list[Any]:
        values = _quantity(log, part, quantity, name)
        if values.keys() != losses.keys():
            odd = sorted(set(values) ^ set(losses))[0]
            raise UserError(f"{name}: {key}/{quantity} and {key}/avg_gt_loss have different rows (row {odd})")
        return [values[index] for index in indices]

    def numbers(quantity: str) -> FloatArray:
        values = column(quantity)
        for index, value in zip(indices, values, strict=True):
            _check_number(value, f"{name}: {key}/{quantity} row {index}")
        return np.asarray(values, dtype=np.float64)

    wrong = column("average_perturb_loss")
    for index, row in zip(indices, wrong, strict=True):
        if not isinstance(row, list) or not row:
            raise UserError(f"{name}: {key}/average_perturb_loss row {index} is not a list of losses")
        for value in row:
            _check_number(value, f"{name}: {key}/average_perturb_loss row {index}")
    return _Rows(
        numbers("avg_gt_loss"), numbers("avg_paraphrased_loss"), metrics.pad_ragged(wrong), numbers("rougeL_recall")
    )


def _quantity(log: Log, part: str, quantity: str, name: str) -> Mapping[str, Any]:
    key = PARTS[part]
    if not isinstance(log.get(key), Mapping):
        raise UserError(
            f"{name} is not an evaluation log of the TOFU release: part {key!r} ({part}) is missing; "
            f"the four parts are {_quoted(PARTS.values())}"
        )
    values = log[key].get(quantity)
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{name}: part {key!r} ({part}) has no rows of {quantity!r}, which the metrics need")
    return values


def _check_number(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        # the value may be text of a forget row: report only its type
        raise UserError(f"{where} is not a finite number (got a {type(value).__name__})")


def _quoted(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
