"""Teacher-forced scoring: token losses of given answers, for any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.models.answers import Text, answer_logits
from ofmu_ray.models.room import logits_at_once, rows_at_once

_LEAST = -1e4  # log p below which p is 0 in fp32


def length_sorted(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches of similar length, longest first: little padding, ties in order."""
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class TokenScores(NamedTuple):
    """A model's scores for each token of one answer, EOS last: lists of the answer's length."""

    logprobs: list[float]
    """log p of the token; nats."""
    matches: list[bool]
    """Whether the token was the most likely one."""
    zscores: list[float]
    """(log p - mean) / standard deviation of log p over the vocabulary, under p (Min-K++, arXiv 2404.02936)."""


def mean_nll(model: Any, texts: Sequence[Text], batch_size: int) -> FloatArray:
    """Mean negative log-likelihood (nats per token, including EOS) of each text's answer, [texts] float64.

    Every text needs at least one prompt token and one answer token.
    """
    losses = np.empty(len(texts))
    for batch in length_sorted([len(ids) for ids, _ in texts], batch_size):
        losses[batch] = batch_nll(model, [texts[position] for position in batch])
    return losses


def batch_nll(model: Any, texts: Sequence[Text]) -> FloatArray:
    """`mean_nll` of one batch of texts (in halves if their logits would be too large)."""
    if _too_large(model, texts):
        half = len(texts) // 2
        return np.concatenate([batch_nll(model, texts[:half]), batch_nll(model, texts[half:])])
    return _nll(model, texts)


def token_scores(model: Any, texts: Sequence[Text], batch_size: int) -> list[TokenScores]:
    """Scores for each answer token of the texts; batches as in `mean_nll`."""
    scores: dict[int, TokenScores] = {}
    for batch in length_sorted([len(ids) for ids, _ in texts], batch_size):
        scores.update(zip(batch, _token_scores(model, [texts[position] for position in batch]), strict=True))
    return [scores[position] for position in range(len(texts))]


@torch.no_grad()
def _token_scores(model: Any, texts: Sequence[Text]) -> list[TokenScores]:
    if _too_large(model, texts):
        half = len(texts) // 2
        return _token_scores(model, texts[:half]) + _token_scores(model, texts[half:])
    return scores_of(*answer_logits(model, texts))


def _too_large(model: Any, texts: Sequence[Text]) -> bool:
    answer_tokens = sum(len(ids) - prompt for ids, prompt in texts)
    most = logits_at_once(model.get_input_embeddings().weight.device)
    return len(texts) > 1 and answer_tokens * model.config.get_text_config().vocab_size > most


def scores_of(logits_nv: torch.Tensor, targets_n: torch.Tensor, counts: Sequence[int]) -> list[TokenScores]:
    """Scores of texts from the logits that predict their tokens, concatenated; `counts`: tokens per text."""
    step = rows_at_once(logits_nv)
    chunks = zip(torch.split(logits_nv, step), torch.split(targets_n, step), strict=True)
    columns = zip(*(standardised(logits, targets) for logits, targets in chunks), strict=True)
    texts = (torch.split(torch.cat(column).cpu(), list(counts)) for column in columns)
    return [TokenScores(*(column.tolist() for column in text)) for text in zip(*texts, strict=True)]


def standardised(logits_nv: torch.Tensor, targets_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of TokenScores, [n] each: z = (log p - mu) / sqrt(max(var, 1e-6)).

    mu and var are mean and variance of log p_v under p_v. The variance is computed around the mean: a difference of two
    moments would lose its digits if the model is certain.
    """
    logp_nv = logits_nv.float().log_softmax(dim=-1)
    logp_n = logp_nv.gather(1, targets_n[:, None])[:, 0]
    matches_n = most_likely(logits_nv) == targets_n
    p_nv = logp_nv.exp()
    logp_nv = logp_nv.clamp_(min=_LEAST)  # excluded tokens have p = 0: avoid 0 * inf
    mean_n = (p_nv * logp_nv).sum(dim=-1)
    variance_n = logp_nv.sub_(mean_n[:, None]).square_().mul_(p_nv).sum(dim=-1)
    zscores_n = (logp_n - mean_n) / variance_n.clamp(min=1e-6).sqrt()
    return logp_n.double(), matches_n, zscores_n.double()


def most_likely(logits_nv: torch.Tensor) -> torch.Tensor:
    """The most likely token of each position (ties: the first), [n]."""
    if logits_nv.device.type == "cpu" and logits_nv.dtype == torch.float32:
        return torch.from_numpy(logits_nv.numpy().argmax(axis=1))  # a tenth of the time of torch's
    return logits_nv.argmax(dim=-1)


@torch.no_grad()
def _nll(model: Any, texts: Sequence[Text]) -> FloatArray:
    logits_nv, targets_n, counts = answer_logits(model, texts)
    nll_n = functional.cross_entropy(logits_nv.float(), targets_n, reduction="none").double().cpu()
    return np.array([float(losses.mean()) for losses in torch.split(nll_n, counts)])
