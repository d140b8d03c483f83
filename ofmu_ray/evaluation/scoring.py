"""Teacher-forced scoring: the mean token loss of given answers, for any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ofmu_ray.evaluation.metrics import FloatArray

Text = tuple[Sequence[int], int]
"""Token ids of prompt and answer (BOS and EOS included), and the number of prompt tokens."""

_LOGITS_AT_ONCE = 1 << 25  # fp32 logits of one forward pass (128 MiB); a batch with more answer tokens is halved


@contextmanager
def head_on(model: Any, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the context the output head sees `select(hidden)` instead of every position.

    The head's cost and the size of the logits follow the selection, and what an architecture does to its logits
    afterwards (soft caps, scales) still happens, because the model's own forward runs.
    """

    def narrow(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (select(inputs[0]), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def length_sorted(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches of similar length, longest first: little padding, ties in order."""
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def mean_nll(model: Any, texts: Sequence[Text], batch_size: int) -> FloatArray:
    """Mean negative log-likelihood (nats per token, EOS counted) of each text's answer, [texts] float64.

    Every text needs at least one prompt token and one answer token.
    """
    losses = np.empty(len(texts))
    for batch in length_sorted([len(ids) for ids, _ in texts], batch_size):
        losses[batch] = batch_nll(model, [texts[position] for position in batch])
    return losses


def batch_nll(model: Any, texts: Sequence[Text]) -> FloatArray:
    """`mean_nll` of texts that go through the model together (in halves when their logits would be large)."""
    answer_tokens = sum(len(ids) - prompt for ids, prompt in texts)
    if len(texts) > 1 and answer_tokens * model.config.get_text_config().vocab_size > _LOGITS_AT_ONCE:
        half = len(texts) // 2
        return np.concatenate([batch_nll(model, texts[:half]), batch_nll(model, texts[half:])])
    return _nll(model, texts)


@torch.inference_mode()
def _nll(model: Any, texts: Sequence[Text]) -> FloatArray:
    device = model.get_input_embeddings().weight.device
    longest = max(len(ids) for ids, _ in texts)
    ids_bt = torch.zeros(len(texts), longest, dtype=torch.long)
    predicts_bt = torch.zeros(len(texts), longest, dtype=torch.bool)  # positions whose next token is an answer's
    for row, (ids, prompt) in enumerate(texts):
        if not 0 < prompt < len(ids):
            raise AssertionError(f"a text of {len(ids)} tokens with {prompt} prompt tokens has no answer to score")
        ids_bt[row] = ids[0]
        ids_bt[row, : len(ids)] = torch.as_tensor(ids)
        predicts_bt[row, prompt - 1 : len(ids) - 1] = True
    targets_n = ids_bt[:, 1:][predicts_bt[:, :-1]].to(device)
    mask = predicts_bt.to(device)
    # padding stands on the right, where a causal model's answer tokens never look: no attention mask needed
    with head_on(model, lambda hidden: hidden[mask]):
        logits_nv = model(input_ids=ids_bt.to(device), use_cache=False).logits
    if logits_nv.dim() == 3:  # a model that does not call its head as a module: all positions came back
        logits_nv = logits_nv[mask]
    token_nll = functional.cross_entropy(logits_nv.float(), targets_n, reduction="none").double().cpu()
    rows = torch.arange(len(texts)).repeat_interleave(predicts_bt.sum(dim=1))
    sums = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, rows, token_nll)
    return np.asarray((sums / predicts_bt.sum(dim=1)).numpy())
