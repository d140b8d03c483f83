"""A plain evaluation to compare ours with: one pass over the rows per metric, as in public unlearning suites.

Batches are in row order and padded. Every pass tokenises its rows again and computes the logits of every position,
including prompt and padding. Generations use `model.generate` on padded batches; rouge_score runs without a cache. The
metrics are those of OpenUnlearning's TOFU suite (https://github.com/locuslab/open-unlearning).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer

from ofmu_ray.data.template import Template
from ofmu_ray.evaluation.rows import EvaluationRow

BATCH = 32
K = 0.4
"""Share of tokens that Min-K and Min-K++ look at."""


def evaluate(
    model: Any, template: Template, rows: Sequence[EvaluationRow], max_new_tokens: int, *, memory: bool, reference: Any
) -> dict[str, Any]:
    """Values of one set's rows, as one list per metric.

    `memory`: also compute memorisation and membership scores, in eight passes, one of them through `reference`, a
    second model in memory (None: six passes, without the Reference attack).
    """
    values: dict[str, Any] = {"answer_nll": _each(model, template, rows, [row.answer for row in rows], _nll)}
    if rows[0].paraphrase is not None:
        paraphrases = [row.paraphrase or "" for row in rows]
        values["paraphrase_nll"] = _each(model, template, rows, paraphrases, _nll)
    wrong = [
        _each(model, template, rows, [row.wrong[number] for row in rows], _nll) for number in range(len(rows[0].wrong))
    ]
    values["wrong_nll"] = [list(losses) for losses in zip(*wrong, strict=True)]
    values["generated"], values["generated_tokens"] = _generate(model, template, rows, max_new_tokens)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    values["rouge_l_recall"] = [
        scorer.score(target=row.answer, prediction=text)["rougeL"].recall
        for row, text in zip(rows, values["generated"], strict=True)
    ]
    if memory:
        answers = [row.answer for row in rows]
        for name, metric in _MEMORY.items():
            values[name] = _each(model, template, rows, answers, metric)
        sizes = [len(zlib.compress(answer.encode())) for answer in answers]
        values["zlib"] = [
            nll / size for nll, size in zip(_each(model, template, rows, answers, _nll), sizes, strict=True)
        ]
        if reference is not None:
            both = (_each(each, template, rows, answers, _nll) for each in (model, reference))
            values["reference"] = [mine - other for mine, other in zip(*both, strict=True)]
    return values


def _each(
    model: Any,
    template: Template,
    rows: Sequence[EvaluationRow],
    answers: Sequence[str],
    metric: Callable[[torch.Tensor, torch.Tensor], float],
) -> list[float]:
    """One pass over the rows: `metric(logits, tokens)` of each answer, [tokens, vocabulary] and [tokens]."""
    values = []
    for start in range(0, len(rows), BATCH):
        texts = [
            template.encode(row.question, answer)
            for row, answer in zip(rows[start : start + BATCH], answers[start : start + BATCH], strict=True)
        ]
        longest = max(len(ids) for ids, _ in texts)
        ids_bt = torch.tensor([ids + [template.pad] * (longest - len(ids)) for ids, _ in texts])
        mask_bt = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in texts])
        with torch.no_grad():
            logits_btv = model(input_ids=ids_bt, attention_mask=mask_bt, use_cache=False).logits
        for row, (ids, prompt) in enumerate(texts):
            values.append(metric(logits_btv[row, prompt - 1 : len(ids) - 1], ids_bt[row, prompt : len(ids)]))
    return values


def _nll(logits_nv: torch.Tensor, ids_n: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits_nv, ids_n))


def _matches(logits_nv: torch.Tensor, ids_n: torch.Tensor) -> list[bool]:
    return list((logits_nv.argmax(dim=-1) == ids_n)[:-1].tolist())  # EOS is dropped


def _exact_memorisation(logits_nv: torch.Tensor, ids_n: torch.Tensor) -> float:
    matches = _matches(logits_nv, ids_n)
    return sum(matches) / len(matches)


def _extraction_strength(logits_nv: torch.Tensor, ids_n: torch.Tensor) -> float:
    matches = _matches(logits_nv, ids_n)
    wrong = [place for place, match in enumerate(matches) if not match]
    return 1 - (wrong[-1] + 1) / len(matches) if wrong else 1.0


def _min_k(logits_nv: torch.Tensor, ids_n: torch.Tensor) -> float:
    logp_nv = logits_nv.log_softmax(dim=-1)
    return _lowest(logp_nv.gather(1, ids_n[:, None])[:-1, 0])


def _min_k_plus(logits_nv: torch.Tensor, ids_n: torch.Tensor) -> float:
    logp_nv = logits_nv.log_softmax(dim=-1)
    p_nv = logits_nv.softmax(dim=-1)
    mean_n = (p_nv * logp_nv).sum(dim=-1)
    variance_n = (p_nv * logp_nv.square()).sum(dim=-1) - mean_n.square()
    logp_n = logp_nv.gather(1, ids_n[:, None])[:, 0]
    return _lowest(((logp_n - mean_n) / variance_n.clamp(min=1e-6).sqrt())[:-1])


def _lowest(values_n: torch.Tensor) -> float:
    """Minus the mean of the lowest share K of the values."""
    return -float(values_n.sort().values[: max(1, int(K * len(values_n)))].mean())


_MEMORY = {
    "loss": _nll,
    "exact_memorisation": _exact_memorisation,
    "extraction_strength": _extraction_strength,
    "min_k": _min_k,
    "min_k_plus": _min_k_plus,
}


def from_tokens(record: dict[str, Any]) -> dict[str, float]:
    """The same scores for one row, from the token-level columns of our table."""
    logprobs, zscores, matches = (record[f"answer_{name}"] for name in ("logprobs", "zscores", "matches"))
    wrong = [place for place, match in enumerate(matches[:-1]) if not match]
    count = len(matches) - 1
    return {
        "loss": record["answer_nll"],
        "exact_memorisation": sum(matches[:-1]) / count,
        "extraction_strength": 1 - (wrong[-1] + 1) / count if wrong else 1.0,
        "min_k": _lowest(torch.tensor(logprobs[:-1])),
        "min_k_plus": _lowest(torch.tensor(zscores[:-1])),
        "zlib": record["answer_nll"] / record["answer_zlib_bytes"],
    }


def _generate(
    model: Any, template: Template, rows: Sequence[EvaluationRow], max_new_tokens: int
) -> tuple[list[str], list[int]]:
    """Greedy answers and their numbers of tokens, EOS not counted."""
    texts, counts = [], []
    for prompts in _batches([template.encode_prompt(row.question) for row in rows]):
        longest = max(len(ids) for ids in prompts)
        ids_bt = torch.tensor([[template.pad] * (longest - len(ids)) + ids for ids in prompts])
        mask_bt = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        output = model.generate(
            input_ids=ids_bt,
            attention_mask=mask_bt,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=template.eos,
            pad_token_id=template.pad,
        )
        for new in output[:, longest:].tolist():
            new = new[: new.index(template.eos)] if template.eos in new else new
            texts.append(template.tokenizer.decode(new, skip_special_tokens=True).strip())
            counts.append(len(new))
    return texts, counts


def _batches(prompts: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    return (prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH))
