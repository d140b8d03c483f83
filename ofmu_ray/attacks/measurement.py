"""The measurements of `ofmu evaluate` beyond the metrics: one model, one check, one table (without text)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from ofmu_ray.config.robustness import PrefixOptions, QuantiseOptions, RelearnOptions
from ofmu_ray.evaluation.actors import Loading
from ofmu_ray.evaluation.rows import EvaluationRow

Kind = Literal["relearn", "quantise", "prefix", "gradient_norm", "alignment", "choice"]
VERSION = 2
"""Part of a check's key. Raise it when a value changes its meaning."""
_PASSES = {"relearn": 20, "quantise": 3, "prefix": 30, "gradient_norm": 4, "alignment": 4, "choice": 4}
"""Approximate passes per row."""
_CHARACTERS = 3
"""Approximate characters per token."""


@dataclass(frozen=True)
class Check:
    """One measurement of one model."""

    kind: Kind
    model: Loading
    weights: str
    """Fingerprint of the model."""
    rows: Mapping[str, Sequence[Any]]
    """Set -> rows: EvaluationRow, or ChoiceRow for a choice check."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The check's own options: those of its dataclass in ofmu_ray.config, or samples and seed, or scoring."""
    reference: Loading | None = None
    """The retrained model, for alignment."""
    reference_weights: str = ""
    batch_size: int = 64

    def key(self, device: str) -> str:
        """Hex digest (32 digits) of all that determines the values; not batch_size, which only affects rounding."""
        rows = {name: [asdict(row) for row in group] for name, group in self.rows.items()}
        models = [self.weights, self.model.template.fingerprint()]
        if self.reference is not None:
            models += [self.reference_weights, self.reference.template.fingerprint()]
        exact = self.model.dtype == torch.float32
        arithmetic = device if exact and device == "cpu" else f"{device}/{self.model.dtype}"
        content = [VERSION, self.kind, arithmetic, models, self.model.max_new_tokens, self.options, rows]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @property
    def host_bytes(self) -> int:
        """Host memory for the weights of a process on a CPU."""
        return self.model.host_bytes + (0 if self.reference is None else self.reference.host_bytes)

    @property
    def flops(self) -> float:
        """Rough cost, good enough to tell seconds from minutes: two operations per weight and token."""
        weights = self.model.weights_bytes / 4
        rows = [row for group in self.rows.values() for row in group]
        texts = [(row.question, *getattr(row, "choices", [row.answer])) for row in rows]
        tokens = sum(len(part) for text in texts for part in text) / _CHARACTERS
        return 2 * weights * tokens * _PASSES[self.kind]


def measure(check: Check, device: str) -> pa.Table:
    """Run a check in this process. The check's module defines the columns.

    Raises:
        UserError: the check cannot use the rows.
    """
    model = check.model.scorer(device).model
    if check.kind == "alignment":
        return _alignment(check, model, device)
    return _MEASURES[check.kind](check, model)


def _relearn(check: Check, model: Any) -> pa.Table:
    from ofmu_ray.attacks.relearning import relearn

    forget, retain, options = check.rows["forget"], check.rows["retain"], RelearnOptions(**check.options)
    return relearn(model, check.model.template, forget, retain, options, batch_size=check.batch_size)


def _quantise(check: Check, model: Any) -> pa.Table:
    from ofmu_ray.attacks.quantisation import quantisation_attack

    options, tables = QuantiseOptions(**check.options), []
    for name in ("forget", "retain"):
        rows = check.rows[name]
        table = quantisation_attack(model, check.model.template, rows, options, batch_size=check.batch_size)
        tables.append(table.append_column("set", pa.array([name] * table.num_rows)))
    return pa.concat_tables(tables)


def _prefix(check: Check, model: Any) -> pa.Table:
    from ofmu_ray.attacks.prefix import prefix_attack

    return prefix_attack(
        model,
        check.model.template,
        check.rows["forget"],
        check.rows["retain"],
        PrefixOptions(**check.options),
        max_new_tokens=check.model.max_new_tokens,
        batch_size=check.batch_size,
    )


def _gradient_norm(check: Check, model: Any) -> pa.Table:
    from ofmu_ray.attacks.gradient_norm import gradient_norms
    from ofmu_ray.attacks.texts import answer_texts

    rows: list[EvaluationRow] = [row for group in check.rows.values() for row in group]
    norms = gradient_norms(model, answer_texts(rows, check.model.template))
    return pa.table({"row_id": [row.row_id for row in rows], "answer_gradient_norm": norms})


def _choice(check: Check, model: Any) -> pa.Table:
    from ofmu_ray.evaluation.multiple_choice import choice_table

    (rows,) = check.rows.values()
    return choice_table(model, check.model.tokenizer, rows, batch_size=check.batch_size, **check.options)


def _alignment(check: Check, model: Any, device: str) -> pa.Table:
    from ofmu_ray.attacks.alignment import align, alignment_table, alignment_texts, representations

    assert check.reference is not None, "alignment needs a reference"
    reference, layers = check.reference.scorer(device).model, []
    own, other = (alignment_texts(check.rows, each.template) for each in (check.model, check.reference))
    for name in own:
        mine = representations(model, own[name], batch_size=check.batch_size)
        theirs = representations(reference, other[name], batch_size=check.batch_size)
        labels = [row.cluster for row in check.rows[name.removesuffix("_paraphrase")]]
        clusters = None if None in labels else np.array(labels)
        layers += align(mine, theirs, set_name=name, name="alignment", clusters=clusters, **check.options)
    return alignment_table(layers)


_MEASURES = {
    "relearn": _relearn,
    "quantise": _quantise,
    "prefix": _prefix,
    "gradient_norm": _gradient_norm,
    "choice": _choice,
}
