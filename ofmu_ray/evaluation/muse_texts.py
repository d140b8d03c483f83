"""What MUSE does with a model: continue texts, answer questions after examples, score whole documents.

As in its release (https://github.com/swj0419/muse_bench): texts get the tokenizer's usual special tokens, decoding is
greedy. One difference: an end token that a tokenizer appends is dropped, as a model would not continue behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ofmu_ray.data.muse_sets import MuseKind
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.generation import generate, generation_columns
from ofmu_ray.evaluation.multiple_choice import usual_tokens
from ofmu_ray.evaluation.rows import EvaluationRow
from ofmu_ray.evaluation.scoring import token_scores
from ofmu_ray.metrics.rouge import rouge_l_f
from ofmu_ray.models.answers import Text

NEW_TOKENS: Mapping[MuseKind, int] = {"verbatim": 128, "knowledge": 32, "document": 0}
"""Longest generation; of a verbatim reference, as many tokens count, special ones among them."""
ANSWER_ENDS = ("\n\n", "\nQuestion", "Question:")


def muse_tokens(rows: Sequence[EvaluationRow], tokenizer: Any) -> tuple[list[Text], list[str] | None]:
    """(ids, leading ones that are given) of each row of a set, and what its generation is compared with."""
    if rows[0].kind == "document":  # the first token has no prediction, unless the tokenizer puts one before it
        return [(ids, 1) for ids in usual_tokens(tokenizer, [row.answer for row in rows])], None
    prompts = usual_tokens(tokenizer, [muse_prompt(row) for row in rows])
    references = [row.answer for row in rows]
    if rows[0].kind == "verbatim":
        starts = [ids[: NEW_TOKENS["verbatim"]] for ids in usual_tokens(tokenizer, references)]
        references = [tokenizer.decode(ids, skip_special_tokens=True) for ids in starts]
    return [(ids, len(ids)) for ids in prompts], references


def muse_prompt(row: EvaluationRow) -> str:
    """The text that a generation continues."""
    if row.kind == "verbatim":
        return row.question
    examples = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in row.turns)
    return f"{examples}Question: {row.question}\nAnswer: "


def muse_values(
    model: Any,
    tokenizer: Any,
    kind: MuseKind,
    texts: Sequence[Text],
    references: Sequence[str] | None,
    names: Sequence[str],
    *,
    stop: frozenset[int],
    batch_size: int,
) -> list[dict[str, Any]]:
    """The columns of each text: log p of a document's tokens, or a generation with its ROUGE-L.

    Raises UserError, with the row's name, if a text does not fit into the model's positions.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, (ids, _) in zip(names, texts, strict=True):
        longest = len(ids) + NEW_TOKENS[kind]
        if room is not None and longest > room:
            raise UserError(
                f"row {name}: {longest} tokens with what is generated, but the model has {room} positions; shorten it"
            )
        if kind == "document" and len(ids) < 2:
            raise UserError(f"row {name}: a document of one token has nothing to score; drop it")
    if references is None:
        scores = token_scores(model, texts, batch_size)
        return [{"answer_logprobs": one.logprobs, "answer_nll": -float(np.mean(one.logprobs))} for one in scores]
    new = generate(model, [ids for ids, _ in texts], max_new_tokens=NEW_TOKENS[kind], stop=stop, batch_size=batch_size)
    said = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
    if kind == "knowledge":
        said = [answer_of(text) for text in said]
    scored = zip(said, new, rouge_l_f(references, said), strict=True)
    return [{**generation_columns(text, tokens), "rouge_l_f": score} for text, tokens, score in scored]


def answer_of(text: str) -> str:
    """The text up to the first of what ends an answer."""
    for end in ANSWER_ENDS:
        text = text.partition(end)[0]
    return text
