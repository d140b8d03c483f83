"""The attacks' metrics as tables of the page: titles, notes, sub-headings and words for their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ofmu_ray.reporting.formats import MetricCell, cell, direction


@dataclass(frozen=True)
class Row:
    """One metric over the models."""

    label: str
    direction: str
    """Which way is better; empty: it depends."""
    cells: Mapping[str, MetricCell]
    """Model -> cell."""


@dataclass(frozen=True)
class Group:
    """Rows under a sub-heading (empty: none)."""

    title: str
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class AttackTable:
    """A check."""

    title: str
    note: str
    """What the metrics mean and which way is better."""
    groups: Sequence[Group]


_TITLES = {
    "relearn": (
        "Relearning attack",
        "Mean answer probability while the model is fine-tuned on a few rows, step by step. What comes back on rows "
        "that the attack does not train on should be no more than in the retrained model. Mean height: of the curve "
        "over all steps.",
    ),
    "quantise": (
        "Rounded weights",
        "Mean answer probability with the weights rounded to 8 and fewer bits: forget rows should not come back.",
    ),
    "prefix": (
        "Other ways to ask",
        "Forget rows under each attack, and each row's worst case over all that are measured on the whole answer (not "
        "the hint, which gives away its first tokens). Compare with the retrained model.",
    ),
    "alignment": (
        "Alignment with the retrained model",
        "How alike the two models represent the answers: centred kernel alignment (CKA; 1: alike) and cosine of the "
        "hidden states, as means over layers; every layer with its interval stands in metrics.json. The cosine says "
        "something only between models that descend from the same weights.",
    ),
    "choice": ("Multiple choice", "Share of right choices, and its distance to chance."),
    "lm_eval": ("lm-evaluation-harness", "As the harness computes them."),
}
_WORDS = {
    "attacked": "Rows that the attack trains on",
    "forget": "Forget rows",
    "retain": "Retain rows",
    "height": "mean height",
    "height_beyond_retrained": "mean height beyond the retrained model's",
    "full": "as stored",
    "probability": "Answer probability",
    "rouge": "ROUGE-L recall",
    "plain": "the question itself",
    "few_shot": "after retain rows",
    "hint": "with a hint (rest of the answer)",
    "worst_case": "worst case",
    "cka_debiased": "Debiased CKA",
    "cka": "CKA",
    "cosine": "Cosine",
    "forget_paraphrase": "forget rows, paraphrased",
    "retain_paraphrase": "retain rows, paraphrased",
    "above_chance": "above chance",
}


def model_row(label: str, direction: str, found: Mapping[str, Mapping[str, Any] | None]) -> Row:
    """A metric's row from what each model has of it, as in metrics.json."""
    return Row(label, direction, {model: cell(metric_name) for model, metric_name in found.items()})


def check_table(name: str, found: Mapping[str, Mapping[str, Any]], models: Sequence[str]) -> AttackTable:
    """An attack's metrics (model -> `<group>/<what>` -> metric) with the page's models as columns."""
    kind, _, which = name.partition("/")
    title, note = _TITLES[kind]
    groups: dict[str, list[Row]] = {}
    for metric_name in dict.fromkeys(metric_name for named in found.values() for metric_name in named):
        if "/layer_" not in metric_name:
            group, _, what = (
                metric_name.rpartition("/") if kind != "alignment" else metric_name.removesuffix("/mean").partition("/")
            )
            values = {model: found.get(model, {}).get(metric_name) for model in models if model in found}
            groups.setdefault(group, []).append(model_row(_words(what), direction(f"{kind}/{metric_name}"), values))
    others = {"forget": "Forget rows that it does not train on", "retain": "Retain rows that it does not train on"}
    words = _WORDS | others if kind == "relearn" else _WORDS
    titled = [Group(words.get(group, group), rows) for group, rows in groups.items()]
    return AttackTable(f"{title}: {which}" if which else title, note, titled)


def _words(what: str) -> str:
    """step_5 -> step 5, rtn4 -> 4 bits."""
    if what.startswith("rtn"):
        return f"{what.removeprefix('rtn')} bits"
    if what.startswith("prefix_"):
        return f"prefix {what.removeprefix('prefix_')}"
    if what in ("forget", "retain"):
        return f"{what} rows"
    return _WORDS.get(what, what.replace("_", " "))
