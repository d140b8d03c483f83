"""The forward pass over answers: the output head runs at labelled tokens only. Shared by training, features,
evaluation and attacks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ofmu_ray.data.batch import IGNORED

Text = tuple[Sequence[int], int]
"""Token ids of prompt and answer (BOS and EOS included), and the number of prompt tokens."""


class Answers(NamedTuple):
    """What a model predicts at the labelled tokens of a micro-batch, row after row."""

    logits_tv: torch.Tensor
    """[tokens, vocabulary], at least fp32: the predictions of each labelled token, from the position before it."""
    labels_t: torch.Tensor
    """int64 [tokens]."""
    rows_t: torch.Tensor
    """int64 [tokens], the row of each token."""
    rows: int


def logits_at(
    module: torch.nn.Module, batch: Mapping[str, Any], positions: torch.Tensor, prefix: str = ""
) -> torch.Tensor:
    """Run the model with its output head at selected positions only: logits [selected, vocabulary], at least fp32.

    `batch`: input_ids and attention_mask (names prefixed by `prefix`), int64 [rows, positions], and position_ids if not
    the default ones. The mask is optional if no selected position attends to padding. `positions`: bool of the same
    shape. The cost of the head and the size of the logits and their gradient scale with the selection.
    """
    ids, mask = batch[f"{prefix}input_ids"], batch.get(f"{prefix}attention_mask")
    options = {"logits_to_keep": positions} if selects_logits(unwrapped(module).__class__) else {}
    if "position_ids" in batch:
        options["position_ids"] = batch["position_ids"]
    logits_tv: torch.Tensor = module(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    if logits_tv.dim() == 3:
        logits_tv = logits_tv[positions]
    return logits_tv.float() if logits_tv.dtype in (torch.bfloat16, torch.float16) else logits_tv


def answers(
    module: torch.nn.Module, batch: Mapping[str, Any], labels: torch.Tensor | None = None, prefix: str = ""
) -> Answers:
    """Run the model and select its predictions of the labelled tokens.

    `batch` as in `logits_at`, plus labels: int64 [rows, positions], -100 means no loss. `labels` overrides them. The
    class of an image is an answer of one token: see `models.classifiers`.
    """
    if "pixels" in batch:
        from ofmu_ray.models.classifiers import class_logits

        labels = (batch[f"{prefix}labels"] if labels is None else labels)[:, 1]
        labelled = labels != IGNORED
        return Answers(class_logits(module, batch)[labelled], labels[labelled], labelled.nonzero()[:, 0], len(labels))
    labels = (batch[f"{prefix}labels"] if labels is None else labels)[:, 1:]
    labelled = labels != IGNORED
    logits_tv = logits_at(module, batch, functional.pad(labelled, (0, 1)), prefix)
    return Answers(logits_tv, labels[labelled], labelled.nonzero()[:, 0], len(labels))


def answer_logits(model: Any, texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits [n, vocabulary] that predict the answers' tokens, these tokens [n], and their number per text."""
    device = model.get_input_embeddings().weight.device
    ids_bt = right_padded(texts)
    labels_bt = torch.full(ids_bt.shape, IGNORED)
    for row, (ids, prompt) in enumerate(texts):
        if not 0 < prompt < len(ids):
            raise AssertionError(f"a text of {len(ids)} tokens with {prompt} prompt tokens has no answer to score")
        labels_bt[row, prompt : len(ids)] = ids_bt[row, prompt : len(ids)]
    logits_nv, targets_n, _, _ = answers(model, {"input_ids": ids_bt.to(device), "labels": labels_bt.to(device)})
    return logits_nv, targets_n, [len(ids) - prompt for ids, prompt in texts]


def right_padded(texts: Sequence[Text]) -> torch.Tensor:
    """Token ids, int64 [texts, longest]. No attention mask is needed: causal models do not attend to the right."""
    ids_bt = torch.zeros(len(texts), max(len(ids) for ids, _ in texts), dtype=torch.long)
    for row, (ids, _) in enumerate(texts):
        ids_bt[row, : len(ids)] = torch.as_tensor(ids)
    return ids_bt


def causal_lm_loss(module: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the token negative log-likelihoods (nats) and the number of labelled tokens; `batch` as in `answers`."""
    logits_tv, labels_t, _, _ = answers(module, batch)
    total = functional.cross_entropy(logits_tv, labels_t, reduction="sum")
    return total, labels_t.new_tensor(len(labels_t))


def unwrapped(module: Any) -> Any:
    """The model inside DeepSpeed's and peft's wrappers."""
    inner = getattr(module, "module", module)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@functools.cache
def selects_logits(model: Any) -> bool:
    """Whether models of this class can restrict their head to positions, like most in transformers."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
