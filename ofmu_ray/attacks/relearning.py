"""Relearning attack: fine-tune a copy of the model for a few steps and measure how far the forgotten rows come back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray.attacks.texts import answer_texts, measured
from ofmu_ray.config import OptimizerConfig
from ofmu_ray.config.robustness import RelearnOptions
from ofmu_ray.data.batches import collate
from ofmu_ray.data.order import batch_order
from ofmu_ray.data.template import Template
from ofmu_ray.engines import Batch, TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.rows import EvaluationRow
from ofmu_ray.evaluation.scoring import mean_nll
from ofmu_ray.models.answers import Text

ATTACKED = "attacked"


def relearn(
    model: Any,
    template: Template,
    forget: Sequence[EvaluationRow],
    retain: Sequence[EvaluationRow],
    options: RelearnOptions,
    *,
    batch_size: int = 64,
) -> pa.Table:
    """Answer losses of all rows at step 0 and at each of `options.steps` of the attack.

    Columns of `texts.measured` plus `step` (int64) and `group`: "attacked" (the rows trained on), "forget" and
    "retain" (the other rows). A step lowers the mean loss over the answer tokens of its rows. It trains all weights in
    fp32, without dropout, with the gradient norm clipped at 1. The choice and order of attacked rows depend only on the
    rows and the seed, so two models face the same attack. `batch_size`: rows measured together.

    Raises UserError if no row of the attacked set would be left over.
    """
    groups = attacked_groups(forget, retain, options)
    texts = {group: answer_texts(rows, template) for group, rows in groups.items()}
    victim = copy.deepcopy(model).requires_grad_(True)
    engine = TorchEngine(victim, inner=OptimizerConfig(name="adamw", lr=options.lr, weight_decay=options.weight_decay))

    def snapshot(step: int) -> list[pa.Table]:
        return [
            measured(rows, mean_nll(victim, texts[group], batch_size), step=step, group=group)
            for group, rows in groups.items()
        ]

    tables = snapshot(0)
    batches = _batches(groups[ATTACKED], texts[ATTACKED], options, template.pad)
    for step, batch in enumerate(batches, start=1):
        gradient, _ = engine.gradient(batch, kind=options.on)
        engine.apply(gradient, "inner")
        if step in options.steps:
            tables += snapshot(step)
    return pa.concat_tables(tables)


def attacked_groups(
    forget: Sequence[EvaluationRow], retain: Sequence[EvaluationRow], options: RelearnOptions
) -> Mapping[str, Sequence[EvaluationRow]]:
    """The rows as "attacked", "forget" and "retain"; every row is in exactly one."""
    source = {"forget": forget, "retain": retain}
    available = source[options.on]
    if options.rows >= len(available):
        raise UserError(
            f"checks.relearn.rows = {options.rows}: there are {len(available)} {options.on} rows, and at least one "
            "must stay out of the attack; lower it"
        )
    drawn = set(np.random.default_rng(options.seed).permutation(len(available))[: options.rows].tolist())
    attacked = [row for index, row in enumerate(available) if index in drawn]
    source[options.on] = [row for index, row in enumerate(available) if index not in drawn]
    return {ATTACKED: attacked, **source}


def _batches(rows: Sequence[EvaluationRow], texts: Sequence[Text], options: RelearnOptions, pad: int) -> list[Batch]:
    """The batch of each step; an epoch contains every row once."""
    lengths = np.array([len(ids) for ids, _ in texts])
    size = min(options.batch_size, len(rows))
    order = batch_order(
        len(rows), options.steps[-1], size, lengths=lengths.__getitem__, seed=options.seed, stream="relearn"
    )
    width = options.micro_batch_size or size
    batches = []
    for chosen in order.tolist():
        encoded = [{"input_ids": texts[index][0], "prompt_tokens": texts[index][1]} for index in chosen]
        micro = [collate(encoded[start : start + width], pad) for start in range(0, size, width)]
        batches.append(Batch(micro=micro, row_ids=[rows[index].row_id for index in chosen]))
    return batches
