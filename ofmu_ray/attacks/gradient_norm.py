"""GradNorm membership inference: the norm of the gradient that an answer would still cause.

An answer from the training set is near a minimum of its own loss, so its gradient is small: a larger value means
"less likely a member". Per row, L is the mean negative log-likelihood of the answer tokens without EOS. The value is
the mean of ||dL/dW||_p over the parameter tensors W (as in OpenUnlearning; not the norm of the complete gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.models.answers import Text, answer_logits


def gradient_norms(model: Any, texts: Sequence[Text], *, p: float = 2.0) -> FloatArray:
    """Mean over parameter tensors of the p-norm of each row's gradient, [rows] float64.

    Rows run one at a time, because each needs its own gradient. The model runs in eval mode, without dropout, so the
    value depends only on the row (OpenUnlearning switches to training mode); its mode and its `.grad` are preserved.
    Tensors that do not require a gradient, or that the loss does not reach, do not count. Tied tensors count once.

    Every text needs one prompt token and two answer tokens (the last is EOS).
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise AssertionError("no parameter requires a gradient")
    training = model.training
    model.eval()
    try:
        return np.array([_gradient_norm(model, weights, text, p) for text in texts], dtype=np.float64)
    finally:
        model.train(training)


def _gradient_norm(model: Any, weights: Sequence[torch.Tensor], text: Text, p: float) -> float:
    with torch.enable_grad():
        gradients = torch.autograd.grad(_answer_loss(model, text), weights, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, p, dtype=torch.float64) for g in gradients if g is not None]
    return float(torch.stack([norm.cpu() for norm in norms]).mean())


def _answer_loss(model: Any, text: Text) -> torch.Tensor:
    """Mean negative log-likelihood of the answer tokens (nats), without EOS."""
    ids, prompt = text
    if not 0 < prompt < len(ids) - 1:
        raise AssertionError(f"a text of {len(ids)} tokens with {prompt} prompt tokens has no answer besides EOS")
    logits_nv, targets_n, _ = answer_logits(model, [(ids[:-1], prompt)])
    return functional.cross_entropy(logits_nv, targets_n)
