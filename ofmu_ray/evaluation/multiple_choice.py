"""Multiple-choice accuracy on rows like those of WMDP and MMLU: {question, choices, answer: index of the right choice}.

letters: the prompt lists the lettered choices, and the model chooses the most likely letter after "Answer:". Prompt and
score match the zero-shot tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, tasks
wmdp and mmlu). cloze: the prompt is just the question, and the model chooses the text with the largest mean
log-likelihood per token; for models too small to follow letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ofmu_ray.data.choices import LETTERS, ChoiceRow, Scoring
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.scoring import length_sorted, mean_nll
from ofmu_ray.metrics.intervals import MetricValue, mean_metric
from ofmu_ray.models.answers import Text, answer_logits

CHOSEN = pa.schema(
    [
        ("row_id", pa.string()),
        ("cluster", pa.string()),  # the row's subject, if there is such a column
        ("answer", pa.int32()),
        ("chosen", pa.int32()),
        ("correct", pa.bool_()),
        ("chance", pa.float64()),  # 1 / number of choices
        ("scores", pa.list_(pa.float64())),  # letters: log p of each letter; cloze: mean log p of the text's tokens
        ("cut", pa.int32()),  # tokens of the longest text beyond the model's positions
    ]
)
"""A model's choices on multiple-choice rows; no text."""


def prompt(row: ChoiceRow, scoring: Scoring = "letters") -> str:
    """The prompt; a choice follows after one space."""
    subject = None if row.subject is None else row.subject.replace("_", " ").strip()
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    if scoring == "cloze":
        return f"{header}Question: {row.question.strip()}\nAnswer:"
    lettered = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, row.choices, strict=False))
    return f"{header}{row.question.strip()}\n{lettered}Answer:"


def choice_table(
    model: Any, tokenizer: Any, rows: Sequence[ChoiceRow], *, scoring: Scoring = "letters", batch_size: int = 16
) -> pa.Table:
    """The model's choice on each row: CHOSEN, in the order of the rows.

    Texts get the tokenizer's usual special tokens, without a final EOS. If space and letter are one token, a row is one
    forward pass. A letter of several tokens scores the sum of their log p. A text is scored per choice. A text longer
    than the model's positions loses its beginning, as in the harness.

    Raises UserError, naming the row, if a choice leaves no room for its prompt.
    """
    answers = [row.choices if scoring == "cloze" else LETTERS[: len(row.choices)] for row in rows]
    encoded = _encoded(tokenizer, [prompt(row, scoring) for row in rows], answers)
    texts, cut = _fitted(encoded, rows, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    if scoring == "letters" and all(len(ids) - head == 1 for options in texts for ids, head in options):
        scores = _letter_scores(model, texts, batch_size)
    else:  # each choice separately: its text, or a letter of several tokens
        flat = [text for options in texts for text in options]
        tokens = np.array([len(ids) - head for ids, head in flat]) if scoring == "letters" else 1.0
        ends = np.cumsum([len(options) for options in texts])[:-1]
        scores = [part.tolist() for part in np.split(-mean_nll(model, flat, batch_size) * tokens, ends)]
    chosen = [int(np.argmax(values)) for values in scores]  # ties: the first
    columns = {
        "row_id": [row.row_id for row in rows],
        "cluster": [row.cluster for row in rows],
        "answer": [row.answer for row in rows],
        "chosen": chosen,
        "correct": [row.answer == choice for row, choice in zip(rows, chosen, strict=True)],
        "chance": [1 / len(row.choices) for row in rows],
        "scores": scores,
        "cut": cut,
    }
    return pa.table(columns, schema=CHOSEN)


def choice_metrics(table: pa.Table, *, samples: int, seed: int, name: str) -> dict[str, MetricValue]:
    """accuracy, and above_chance: accuracy minus chance (the mean of 1 / number of choices). Both are shares of rows.

    With more than one subject in the table, the rows of a subject are resampled together.
    """
    correct = table["correct"].to_numpy(zero_copy_only=False).astype(np.float64)
    subjects = table["cluster"].to_pylist()
    clusters = np.array(subjects) if None not in subjects and len(set(subjects)) > 1 else None
    above = correct - table["chance"].to_numpy()
    return {
        metric: mean_metric(values, samples=samples, seed=seed, name=f"{name}/{metric}", clusters=clusters)
        for metric, values in (("accuracy", correct), ("above_chance", above))
    }


def _encoded(tokenizer: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Text]]:
    """(ids of prompt, space and answer; number of prompt tokens) of each answer to each prompt."""
    heads = usual_tokens(tokenizer, list(prompts))
    pairs = [(text, answer) for text, row_answers in zip(prompts, answers, strict=True) for answer in row_answers]
    full_ids = iter(usual_tokens(tokenizer, [f"{text} {answer.strip()}" for text, answer in pairs]))
    encoded: list[list[Text]] = []
    for head, row_answers in zip(heads, answers, strict=True):
        options: list[Text] = []
        for answer in row_answers:
            ids = next(full_ids)
            if ids[: len(head)] != head or len(ids) == len(head):  # a token spans the boundary
                ids = head + tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]
            options.append((ids, len(head)))
        encoded.append(options)
    return encoded


def usual_tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    end = tokenizer.eos_token_id
    closes = bool(tokenizer("a")["input_ids"][-1] == end) and end is not None
    return [text[:-1] if closes else text for text in ids]


def _fitted(
    encoded: list[list[Text]], rows: Sequence[ChoiceRow], room: int | None
) -> tuple[list[list[Text]], list[int]]:
    """The last `room` tokens of each text, and how many tokens the longest text of each row lost."""
    fitted, lost = [], []
    for row, options in zip(rows, encoded, strict=True):
        cuts = [0 if room is None else max(len(ids) - room, 0) for ids, _ in options]
        if any(head <= cut for (_, head), cut in zip(options, cuts, strict=True)):
            raise UserError(
                f"row {row.row_id}: a choice alone is longer than the model's {room} positions; drop the row"
            )
        fitted.append([(ids[cut:], head - cut) for (ids, head), cut in zip(options, cuts, strict=True)])
        lost.append(max(cuts))
    return fitted, lost


@torch.no_grad()
def _letter_scores(model: Any, texts: Sequence[Sequence[Text]], batch_size: int) -> list[list[float]]:
    """log p of each row's one-token answers after its prompt: one forward pass per row, logits of one position."""
    scores: list[list[float]] = [[] for _ in texts]
    for batch in length_sorted([options[0][1] for options in texts], batch_size):
        logits_bv, _, _ = answer_logits(model, [texts[row][0] for row in batch])
        for row, logp_v in zip(batch, logits_bv.log_softmax(dim=-1).double().cpu(), strict=True):
            scores[row] = logp_v[[ids[-1] for ids, _ in texts[row]]].tolist()
    return scores
