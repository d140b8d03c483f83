"""Every unlearning loss and its gradient against the written formula (tests/loss_formulas.py), in float64."""

from __future__ import annotations

import math
from typing import Any

import loss_formulas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ofmu_ray import config
from ofmu_ray.algorithm import losses
from ofmu_ray.methods import build_method

VOCABULARY = 11
VARIANTS: dict[str, config.OneLoopConfig] = {
    "gradient_ascent": config.METHODS["gradient_ascent"](),
    "grad_diff": config.METHODS["grad_diff"](),
    "simnpo": config.METHODS["simnpo"](),
    "simnpo-delta": config.METHODS["simnpo"](beta=0.8, delta=1.5),
    "wga": config.METHODS["wga"](),
    "wga-beta": config.METHODS["wga"](beta=0.25),
    "satimp": config.METHODS["satimp"](),
    "satimp-half": config.METHODS["satimp"](beta1=0.5, beta2=2.0),
    "ceu": config.METHODS["ceu"](),
    "ceu-all": config.METHODS["ceu"](skip_tokens=0),
    "pdu": config.METHODS["pdu"](),
    "blur": config.METHODS["blur"](),
    "blur-nll": config.METHODS["blur"](forget_loss="nll"),
    "dualoptim": config.METHODS["dualoptim"](),
    "dualoptim-npo": config.METHODS["dualoptim"](forget_loss="npo", npo_beta=0.4),
    "dualoptim-nll": config.METHODS["dualoptim"](forget_loss="nll"),
}


class Table(torch.nn.Module):
    """A model whose logits are its parameter."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return self


def random_batch(seed: int, rows: int = 4, positions: int = 9) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Random logits, and rows with prompts of 1 to 3 tokens, answers of 3 to 6 and padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, positions, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.full((rows, positions), -100)
    for row in range(rows):
        prompt, answer = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 4), (3, 7)))
        labels[row, prompt : prompt + answer] = torch.randint(VOCABULARY, (answer,), generator=generator)
    ids = torch.zeros_like(labels)
    tokens = int((labels != -100).sum())
    reference = torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(1)
    return logits, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "reference_nll": 5 + 5 * torch.rand(rows, generator=generator, dtype=torch.float64),
        "reference_logprobs": reference,
    }


def value_and_gradient(loss: Any, table: Table) -> tuple[float, torch.Tensor]:
    (gradient,) = torch.autograd.grad(loss, [table.logits])
    return float(loss), gradient


def compare(ours: Any, formula: Any, seed: int) -> None:
    """Value and gradient agree: as the mean over the count, for the full batch and summed over single rows."""
    logits, micro = random_batch(seed)
    table = Table(logits)
    total, count = ours(table, micro)
    value, gradient = value_and_gradient(total / count, table)
    expected, expected_gradient = value_and_gradient(formula(table.logits, micro), table)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)

    sums = counts = 0.0
    at = 0
    for row in range(len(logits)):
        tokens = int((micro["labels"][row] != -100).sum())
        single = {name: tensor[row : row + 1] for name, tensor in micro.items()}
        single["reference_logprobs"] = micro["reference_logprobs"][at : at + tokens]
        at += tokens
        part, number = ours(Table(logits[row : row + 1]), single)
        sums, counts = sums + float(part), counts + int(number)
    assert counts == count
    assert sums / counts == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forget_loss(variant: str, seed: int) -> None:
    options = VARIANTS[variant]
    formula = loss_formulas.FORGET[variant.partition("-")[0]]
    method = build_method(options)
    compare(method.forget_loss, lambda logits, micro: formula(logits, micro, options), seed)


@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_retain_loss(retain_loss: Any) -> None:
    method = build_method(config.METHODS["grad_diff"](retain_loss=retain_loss))
    compare(method.retain_loss, getattr(loss_formulas, retain_loss), seed=2)


def test_ceu_gradient_is_what_it_says() -> None:
    """p - q: bounded at any confidence, unlike gradient ascent's."""
    logits_tv = torch.tensor([[50.0, 1.0, 0.0], [-50.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    total, count = losses.distilled_without_truth(logits_tv, torch.tensor([0, 0]))
    assert count == 2
    (gradient,) = torch.autograd.grad(total, [logits_tv])
    q = math.e / (1 + math.e)
    expected = torch.tensor([[1.0, -q, q - 1], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


@settings(max_examples=25)
@given(st.floats(1e-6, 30.0), st.floats(0.01, 30.0))
def test_npo_tends_to_gradient_ascent(nll: float, reference: float) -> None:
    """d/d nll is -1 at beta = 0, and fades with -2 sigmoid(-beta (nll - reference)) where the answer is forgotten."""
    for beta in (1e-7, 0.1, 4.5):
        nll_r = torch.tensor([nll], dtype=torch.float64, requires_grad=True)
        total, _ = losses.negative_preference(nll_r, torch.tensor([reference], dtype=torch.float64), beta=beta)
        (slope,) = torch.autograd.grad(total, [nll_r])
        assert float(slope) == pytest.approx(-2 / (1 + math.exp(beta * (nll - reference))), rel=1e-9)
    assert -2 / (1 + math.exp(1e-7 * (nll - reference))) == pytest.approx(-1, abs=1e-5)


def test_extreme_confidence_stays_finite() -> None:
    """p = 1 and p = 0 to the last bit, in fp32."""
    logits_tv = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    labels_t = torch.tensor([0, 0])
    nll_t = losses.token_nll(logits_tv, labels_t)
    for saturation, importance in ((0.0, 0.0), (1.0, 0.0), (5.0, 1.0), (0.0, 1.0)):
        total, _ = losses.weighted_ascent(nll_t, saturation=saturation, importance=importance)
        (gradient,) = torch.autograd.grad(total, [logits_tv], retain_graph=True)
        assert torch.isfinite(total)
        assert torch.isfinite(gradient).all()


def test_no_weights_is_gradient_ascent() -> None:
    nll_t = torch.tensor([0.5, 2.0])
    total, count = losses.weighted_ascent(nll_t)
    assert (float(total), count) == (-2.5, 2)
