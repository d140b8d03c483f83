"""GradNorm membership inference: the norm of the gradient that an answer would still cause.

An answer from the training set is near a minimum of its own loss, so its gradient is small: a larger value means
"less likely a member". Per row, L is the mean negative log-likelihood of the answer tokens without EOS. The value is
the mean of ||dL/dW||_p over the parameter tensors W (as in OpenUnlearning; not the norm of the complete gradient).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ofmu_ray.data.batch import IGNORED
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.models.answers import Text, answer_logits, right_padded, selects_logits

BATCH_BYTES = 2**26
"""For the gradients of the rows of a batch."""
FEWEST_ROWS = 4
"""Of a batch: on a CPU, smaller ones take longer than row by row."""


def gradient_norms(model: Any, texts: Sequence[Text], *, p: float = 2.0) -> FloatArray:
    """Mean over parameter tensors of the p-norm of each row's gradient, [rows] float64.

    Each row needs its own gradient. Small models (`BATCH_BYTES` for `FEWEST_ROWS` gradients) run rows of similar length
    together by `torch.func`; larger ones, and those with an operation that `vmap` does not support, row by row. The
    model runs in eval mode, without dropout, so the value depends only on the row (OpenUnlearning switches to training
    mode); its mode and its `.grad` are preserved. Tensors that do not require a gradient, or that the loss does not
    reach, do not count. Tied tensors count once.

    Every text needs one prompt token and two answer tokens (the last is EOS).
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        raise AssertionError("no parameter requires a gradient")
    for ids, prompt in texts:
        if not 0 < prompt < len(ids) - 1:
            raise AssertionError(f"a text of {len(ids)} tokens with {prompt} prompt tokens has no answer besides EOS")
    texts = [(ids[:-1], prompt) for ids, prompt in texts]
    training = model.training
    model.eval()
    try:
        batch = BATCH_BYTES // sum(weight.nbytes for weight in weights.values())
        if min(batch, len(texts)) >= FEWEST_ROWS and selects_logits(model.__class__):
            try:
                return _batched(model, weights, texts, p, batch)
            except RuntimeError:  # vmap's, or out of memory
                pass
        return np.array([_norms(_gradient(model, weights, text), p).mean().item() for text in texts], dtype=np.float64)
    finally:
        model.train(training)


def _gradient(model: Any, weights: Mapping[str, torch.Tensor], text: Text) -> dict[str, torch.Tensor]:
    """Of one row, by the names of the tensors that the loss reaches."""
    with torch.enable_grad():
        logits_nv, targets_n, _ = answer_logits(model, [text])
        loss = functional.cross_entropy(logits_nv, targets_n)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: part for name, part in zip(weights, gradients, strict=True) if part is not None}


def _norms(gradient: Mapping[str, torch.Tensor], p: float, dim: int = 0) -> torch.Tensor:
    """p-norms over all dimensions from `dim` on, float64 [tensors] or [tensors, rows]."""
    parts = [part.flatten(dim) if part.dim() > dim else part.unsqueeze(dim) for part in gradient.values()]
    return torch.stack([torch.linalg.vector_norm(part, p, dim, dtype=torch.float64).cpu() for part in parts])


def _batched(
    model: Any, weights: Mapping[str, torch.Tensor], texts: Sequence[Text], p: float, batch: int
) -> FloatArray:
    """The values by batches of rows of similar length. Raises RuntimeError if `vmap` does not support the model."""
    reached = {name: weights[name] for name in _gradient(model, weights, texts[0])}
    norms_r = np.zeros(len(texts))
    order = sorted(range(len(texts)), key=lambda row: len(texts[row][0]))
    for begin in range(0, len(order), batch):
        rows = order[begin : begin + batch]
        norms_r[rows] = _norms(_gradients(model, reached, [texts[row] for row in rows]), p, dim=1).mean(dim=0).numpy()
    return norms_r


def _gradients(model: Any, weights: Mapping[str, torch.Tensor], texts: Sequence[Text]) -> dict[str, torch.Tensor]:
    """Of each row, [rows, *shape] by name."""
    ids_bt = right_padded(texts)
    longest = max(len(ids) - prompt for ids, prompt in texts)
    labels_bn = torch.full((len(texts), longest), IGNORED)
    before_bn = torch.zeros_like(labels_bn)  # positions that predict the labels
    for row, (ids, prompt) in enumerate(texts):
        length = len(ids) - prompt
        labels_bn[row, :length] = ids_bt[row, prompt : len(ids)]
        before_bn[row, :length] = torch.arange(prompt - 1, len(ids) - 1)

    def loss(
        given: dict[str, torch.Tensor], ids_t: torch.Tensor, before_n: torch.Tensor, labels_n: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": ids_t[None], "use_cache": False, "logits_to_keep": before_n}
        logits_nv = torch.func.functional_call(model, given, kwargs=inputs).logits[0]
        wide = torch.promote_types(logits_nv.dtype, torch.float32)
        return functional.cross_entropy(logits_nv.to(wide), labels_n, ignore_index=IGNORED)

    device = model.get_input_embeddings().weight.device
    columns = [column.to(device) for column in (ids_bt, before_bn, labels_bn)]
    fixed = {name: weight.detach() for name, weight in weights.items()}
    # other attention kernels have backward passes that vmap runs row by row
    with sdpa_kernel(SDPBackend.MATH):
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
        gradients: dict[str, torch.Tensor] = each(fixed, *columns)
    return gradients
