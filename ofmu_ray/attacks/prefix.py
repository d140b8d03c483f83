"""Prompt-prefix attack: does the model still give a forgotten answer when the question is asked differently?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ofmu_ray.attacks.texts import answer_texts, measured
from ofmu_ray.config.robustness import QUESTION, PrefixOptions
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.generation import generate, stop_ids
from ofmu_ray.evaluation.rows import EvaluationRow
from ofmu_ray.evaluation.scoring import mean_nll
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.rouge import rouge_l_recall
from ofmu_ray.models.answers import Text

PLAIN, FEW_SHOT, HINT = "plain", "few_shot", "hint"


class Attack(NamedTuple):
    """One way to ask for the answers of all rows."""

    name: str
    """"plain", "prefix_1" (counted from 1, in the options' order), "few_shot" or "hint"."""
    option: str
    """The option behind it, for errors."""
    texts: list[Text]
    """Tokens per row; the tokens after the prompt are measured."""


def prefix_attack(
    model: Any,
    template: Template,
    rows: Sequence[EvaluationRow],
    shots: Sequence[EvaluationRow],
    options: PrefixOptions,
    *,
    max_new_tokens: int = 200,
    batch_size: int = 64,
) -> pa.Table:
    """Answer loss and ROUGE-L recall of each row under each attack, including the plain question.

    Columns of `texts.measured` plus `attack` and `rouge_l_recall` (null unless `options.generate`). "hint" is measured
    only on the rest of the answer: loss on the tokens after the hint, recall of the words after it. Compare its values
    with other models under the same hint, not with "plain". `shots`: rows (of the retain set) that "few_shot" draws
    from. Generated text is not stored.

    Raises UserError if `options.shots` exceeds the available rows, or if a row does not fit into the model.
    """
    tables = []
    for attack in attacks(template, rows, shots, options):
        _check_room(model, attack, rows)
        nll = mean_nll(model, attack.texts, batch_size)
        recall = pa.nulls(len(rows), pa.float64())
        if options.generate:
            recalls = _recalls(model, template, attack, rows, max_new_tokens, batch_size)
            recall = pa.array(recalls, pa.float64())
        tables.append(measured(rows, nll, attack=attack.name, rouge_l_recall=recall))
    return pa.concat_tables(tables)


def worst_case(table: pa.Table) -> pa.Table:
    """The attack that recovers most, per row: row_id, cluster, probability, attack, rouge_l_recall.

    Largest probability and largest recall, each over "plain" and all attacks that are measured on the full answer (not
    "hint"). `attack` names the one with the largest probability; the first one on a tie.
    """
    full = table.filter(pc.not_equal(table["attack"], HINT))
    names = np.array(full["attack"].unique().to_pylist())
    first = full.slice(0, full.num_rows // len(names))

    def by_attack(column: str) -> FloatArray:  # [attacks, rows]
        return np.asarray(full[column].to_numpy().astype(np.float64).reshape(len(names), -1))

    probability, recall = by_attack("probability"), by_attack("rouge_l_recall")
    missing = np.isnan(recall).any(axis=0)
    return pa.table(
        {
            "row_id": first["row_id"],
            "cluster": first["cluster"],
            "probability": probability.max(axis=0),
            "attack": names[probability.argmax(axis=0)],
            "rouge_l_recall": pa.array(recall.max(axis=0), pa.float64(), mask=missing),
        }
    )


def attacks(
    template: Template, rows: Sequence[EvaluationRow], shots: Sequence[EvaluationRow], options: PrefixOptions
) -> Iterator[Attack]:
    """The configured attacks, "plain" first."""
    plain = answer_texts(rows, template)
    yield Attack(PLAIN, "data.format.max_length", plain)
    for number, prefix in enumerate(options.prefixes, start=1):
        reworded = [replace(row, question=prefix.replace(QUESTION, row.question)) for row in rows]
        yield Attack(f"prefix_{number}", "checks.prefix.prefixes", answer_texts(reworded, template))
    if options.shots:
        context = _context(template, shots, options)
        bos = int(template.bos is not None)
        texts: list[Text] = [([*context, *ids[bos:]], len(context) + prompt - bos) for ids, prompt in plain]
        yield Attack(FEW_SHOT, "checks.prefix.shots", texts)
    if options.hint_tokens:
        yield Attack(HINT, "checks.prefix.hint_tokens", [_with_hint(text, options.hint_tokens) for text in plain])


def _context(template: Template, shots: Sequence[EvaluationRow], options: PrefixOptions) -> list[int]:
    """The drawn rows in sequence, in the training format, with one BOS in front."""
    if options.shots > len(shots):
        raise UserError(f"checks.prefix.shots = {options.shots}: there are {len(shots)} retain rows; lower it")
    drawn = np.random.default_rng(options.seed).permutation(len(shots))[: options.shots]
    bos = [] if template.bos is None else [template.bos]
    texts = answer_texts([shots[index] for index in drawn], template)
    return bos + [token for ids, _ in texts for token in ids[len(bos) :]]


def _with_hint(text: Text, tokens: int) -> Text:
    """The text with the first answer tokens moved into the prompt; one token besides EOS is always left to measure."""
    ids, prompt = text
    return ids, min(prompt + tokens, len(ids) - 2)


def _recalls(
    model: Any, template: Template, attack: Attack, rows: Sequence[EvaluationRow], max_new_tokens: int, batch_size: int
) -> list[float]:
    tokenizer = template.tokenizer
    new = generate(
        model,
        [ids[:prompt] for ids, prompt in attack.texts],
        max_new_tokens=max_new_tokens,
        stop=stop_ids(model, tokenizer),
        batch_size=batch_size,
    )
    references = [row.answer for row in rows]
    if attack.name == HINT:
        references = [tokenizer.decode(ids[prompt:], skip_special_tokens=True) for ids, prompt in attack.texts]
    return rouge_l_recall(references, [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new])


def _check_room(model: Any, attack: Attack, rows: Sequence[EvaluationRow]) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row, (ids, _) in zip(rows, attack.texts, strict=True):
        if room is not None and len(ids) > room:
            raise UserError(
                f"{attack.option}: row {row.row_id} has {len(ids)} tokens under the attack {attack.name!r}, but the "
                f"model takes {room}; shorten it"
            )
