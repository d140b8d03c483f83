"""GradNorm against gradients computed one row and one tensor at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_models import ARCHITECTURES, tiny_model, tiny_tokenizer

from ofmu_ray.attacks import gradient_norm
from ofmu_ray.attacks.gradient_norm import gradient_norms
from ofmu_ray.config import FormatConfig
from ofmu_ray.data.template import Template

TEXTS = [
    Template(tiny_tokenizer(), FormatConfig()).encode(f"who is person {row}?", "the answer " * (1 + row) + "is long")
    for row in range(4)
]


def _by_hand(model: torch.nn.Module, ids: list[int], prompt: int, p: float) -> float:
    """The explicit loss over all logits, backward into .grad."""
    model.zero_grad()
    logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    (-sum(logp[t - 1, ids[t]] for t in range(prompt, len(ids) - 1)) / (len(ids) - 1 - prompt)).backward()
    norms = [float((w.grad.double().abs() ** p).sum() ** (1 / p)) for w in model.parameters() if w.grad is not None]
    model.zero_grad()
    return float(np.mean(norms))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_equals_autograd_by_hand(architecture: str, p: float) -> None:
    model = tiny_model(architecture)
    norms = gradient_norms(model, TEXTS, p=p)
    assert norms.dtype == np.float64
    assert norms == pytest.approx([_by_hand(model, *text, p) for text in TEXTS], rel=1e-4)


def _passes(model: torch.nn.Module) -> list[None]:
    """Grows by one with each forward pass."""
    passes: list[None] = []
    model.register_forward_hook(lambda *_: passes.append(None))
    return passes


def test_small_models_run_in_batches_and_large_ones_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.unused = torch.nn.Linear(3, 3)  # in a batch its gradient is zero, and would lower the mean
    passes = _passes(model)
    together = gradient_norms(model, TEXTS)
    assert len(passes) == 2, "one row to see what the loss reaches, then all"
    weights = sum(weight.nbytes for weight in model.parameters())
    monkeypatch.setattr(gradient_norm, "BATCH_BYTES", 3 * weights)
    assert together == pytest.approx(gradient_norms(model, TEXTS), rel=1e-5)
    assert len(passes) == 2 + len(TEXTS)


def test_what_vmap_does_not_support_runs_row_by_row() -> None:
    model = tiny_model()
    expected = gradient_norms(model, TEXTS)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits if logits.sum() < 1e9 else logits * 2)
    passes = _passes(model)
    assert gradient_norms(model, TEXTS) == pytest.approx(expected, rel=1e-5)
    assert len(passes) == 1 + len(TEXTS)


def test_eos_does_not_count() -> None:
    ids, prompt = TEXTS[0]
    other = [*ids[:-1], ids[-1] + 1]
    assert gradient_norms(tiny_model(), [(other, prompt)]) == gradient_norms(tiny_model(), [(ids, prompt)])


def test_dropout_is_off_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2").train()
    assert model.config.resid_pdrop > 0
    marked = next(model.parameters())
    marked.grad = torch.ones_like(marked)
    with torch.no_grad():
        assert (gradient_norms(model, TEXTS[:2]) == gradient_norms(model, TEXTS[:2])).all()
    assert model.training
    assert bool((marked.grad == 1).all())
    assert [weight.grad is None for weight in model.parameters()].count(False) == 1


def test_frozen_tensors_do_not_count() -> None:
    model = tiny_model()
    kept = model.lm_head.weight
    model.requires_grad_(False)
    kept.requires_grad_(True)
    hidden = {}
    handle = model.lm_head.register_forward_pre_hook(lambda _module, inputs: hidden.update(h=inputs[0]))
    ids, prompt = TEXTS[0]
    logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -2].detach()
    handle.remove()
    error = logits.softmax(dim=-1)
    error[range(len(error)), ids[prompt:-1]] -= 1  # dL/dlogits, times the number of tokens
    gradient = error.T @ hidden["h"][0, prompt - 1 : -2] / len(error)
    assert gradient_norms(model, TEXTS[:1]) == pytest.approx([float(gradient.norm())], rel=1e-4)
    kept.requires_grad_(False)
    with pytest.raises(AssertionError, match="requires a gradient"):
        gradient_norms(model, TEXTS[:1])


def test_an_answer_of_eos_alone_is_refused() -> None:
    with pytest.raises(AssertionError, match="no answer besides EOS"):
        gradient_norms(tiny_model(), [([0, 5, 1], 2)])
