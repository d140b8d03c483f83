"""The unlearning losses directly from their formulas: plain loops over rows and tokens, without our code.

Each takes logits [rows, positions, vocabulary], the micro-batch and the method's options, and returns the mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Micro = Mapping[str, torch.Tensor]


def predictions(logits: torch.Tensor, labels: torch.Tensor) -> list[list[tuple[torch.Tensor, int]]]:
    """Row by row, (logits of the position before, label) of each labelled token."""
    return [
        [(logits[row, at - 1], int(labels[row, at])) for at in range(1, labels.shape[1]) if labels[row, at] != -100]
        for row in range(len(labels))
    ]


def log_softmax(z: torch.Tensor) -> torch.Tensor:
    return z - z.exp().sum().log()


def log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> list[list[torch.Tensor]]:
    return [[log_softmax(z)[y] for z, y in row] for row in predictions(logits, labels)]


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean()


def flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def nll(logits: torch.Tensor, micro: Micro, _: Any = None) -> torch.Tensor:
    return mean([-lp for lp in flat(log_probabilities(logits, micro["labels"]))])


def ascent(logits: torch.Tensor, micro: Micro, _: Any = None) -> torch.Tensor:
    return -nll(logits, micro)


def weighted(logits: torch.Tensor, micro: Micro, b1: float, b2: float) -> torch.Tensor:
    terms = []
    for lp in flat(log_probabilities(logits, micro["labels"])):
        p = math.exp(lp.item())
        terms.append(p**b1 * (1 - p) ** b2 * lp)
    return mean(terms)


def wga(logits: torch.Tensor, micro: Micro, options: Any) -> torch.Tensor:
    return weighted(logits, micro, options.beta, 0.0)


def satimp(logits: torch.Tensor, micro: Micro, options: Any) -> torch.Tensor:
    return weighted(logits, micro, options.beta1, options.beta2)


def simnpo(logits: torch.Tensor, micro: Micro, options: Any) -> torch.Tensor:
    terms = []
    for row in log_probabilities(logits, micro["labels"]):
        x = options.beta * (-sum(row) / len(row) - options.delta)
        terms.append(2 / options.beta * torch.log(1 + torch.exp(-x)))
    return mean(terms)


def npo(logits: torch.Tensor, micro: Micro, options: Any) -> torch.Tensor:
    """With the options of BLUR and DualOptim."""
    terms = []
    for row, reference in zip(log_probabilities(logits, micro["labels"]), micro["reference_nll"], strict=True):
        ratio = torch.exp(sum(row) + reference)  # pi / pi_ref of the complete answer
        terms.append(2 / options.npo_beta * torch.log(1 + ratio**options.npo_beta))
    return mean(terms)


def ceu(logits: torch.Tensor, micro: Micro, options: Any) -> torch.Tensor:
    terms = []
    for row in predictions(logits, micro["labels"]):
        for z, y in row[options.skip_tokens :]:
            target = z.detach().exp()
            target[y] = 0
            terms.append(-(target / target.sum() * log_softmax(z)).sum())
    return mean(terms)


def margin(logits: torch.Tensor, micro: Micro, options: Any) -> torch.Tensor:
    chosen = [z for z, _ in flat(predictions(logits, micro["labels"]))]
    return mean([(max(z) - sum(z) / len(z)) ** 2 for z in chosen])


def blur(logits: torch.Tensor, micro: Micro, options: Any) -> torch.Tensor:
    return npo(logits, micro, options) if options.forget_loss == "npo" else ascent(logits, micro)


def kl(logits: torch.Tensor, micro: Micro, _: Any = None) -> torch.Tensor:
    terms = []
    pairs = flat(predictions(logits, micro["labels"]))
    for (z, _label), reference in zip(pairs, micro["reference_logprobs"], strict=True):
        terms.append((reference.exp() * (reference - log_softmax(z))).sum())
    return mean(terms)


def entropy(logits: torch.Tensor, micro: Micro, _: Any = None) -> torch.Tensor:
    words = logits.shape[-1]
    pairs = flat(predictions(logits, micro["labels"]))
    return mean([sum(1 / words * (math.log(1 / words) - lp) for lp in log_softmax(z)) for z, _ in pairs])


def dualoptim(logits: torch.Tensor, micro: Micro, options: Any) -> torch.Tensor:
    return {"entropy": entropy, "npo": npo, "nll": ascent}[options.forget_loss](logits, micro, options)


FORGET = {
    "gradient_ascent": ascent,
    "grad_diff": ascent,
    "simnpo": simnpo,
    "wga": wga,
    "satimp": satimp,
    "ceu": ceu,
    "pdu": margin,
    "blur": blur,
    "dualoptim": dualoptim,
}
"""Method -> forget loss."""
