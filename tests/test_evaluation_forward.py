"""The ways through a model that takes trees: its own forward, and the lean one of small models of Llama's kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from evaluation_models import tiny_model

from ofmu_ray.evaluation import lean, tree
from ofmu_ray.evaluation.forward import AsItIs
from ofmu_ray.evaluation.lean import Lean

_TEXTS = [
    [([3, 9, 4, 8, 15, 16, 23, 42, 7, 1], 4), ([3, 9, 4, 8, 15, 16, 30, 31, 1], 4), ([3, 9, 4, 8, 99, 1], 4)],
    [([5, 6, *range(40, 90), 1], 2)],
]


def _model(architecture: str = "llama", **changes: Any) -> Any:
    """A tiny model whose norms and biases are none of the numbers that they start from."""
    model = tiny_model(architecture, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.3)
    return model


@pytest.mark.parametrize(
    "model",
    [
        _model(),
        _model(attention_bias=True, mlp_bias=True),
        _model(tie_word_embeddings=True, num_key_value_heads=4, hidden_act="gelu"),
        _model(head_dim=6, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}),
        _model("qwen2"),
    ],
    ids=["grouped heads", "biases", "tied", "other rotation", "qwen2"],
)
def test_the_lean_forward_gives_what_the_model_gives(model: Any) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trees = [tree.tree_of(texts) for texts in _TEXTS]
    forward = tree.forward_of(model)
    assert isinstance(forward, Lean)
    found = tree.tree_logits(forward, trees)
    expected = tree.tree_logits(AsItIs(model), trees)
    torch.testing.assert_close(found.logits_nv, expected.logits_nv, rtol=1e-4, atol=1e-4)
    assert found.logits_nv.shape == (sum(len(each.tokens) - each.prompt + 1 for each in trees), 320)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"


def test_the_lean_forward_has_the_weights_of_its_time() -> None:
    model = _model()
    trees = [tree.tree_of(texts) for texts in _TEXTS]
    before = tree.tree_logits(tree.forward_of(model), trees).logits_nv
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(2)
    forward = tree.forward_of(model)
    assert isinstance(forward, Lean)
    found = tree.tree_logits(forward, trees).logits_nv
    torch.testing.assert_close(found, tree.tree_logits(AsItIs(model), trees).logits_nv, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.1


class _OnePlusWeight(torch.nn.Module):
    """A norm with the names of Llama's that computes something else."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)


def _hooked(model: Any) -> Any:
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return model


def _other_norm(model: Any) -> Any:
    model.model.layers[1].input_layernorm = _OnePlusWeight(model.model.layers[1].input_layernorm)
    return model


def _scaled(model: Any) -> Any:
    model.model.layers[0].self_attn.scaling *= 1.001  # in the model only: `Lean` reads it too
    model.model.embed_tokens.forward = lambda ids: 1.001 * torch.nn.functional.embedding(ids, model.lm_head.weight)
    return model


def _adapted(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


@pytest.mark.parametrize(
    "change", [_hooked, _other_norm, _scaled, _adapted, torch.nn.Module.double, torch.nn.Module.bfloat16]
)
def test_models_that_compute_something_else_run_as_they_are(change: Callable[[Any], Any]) -> None:
    assert isinstance(tree.forward_of(change(_model())), AsItIs)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_models_of_other_kinds_run_as_they_are(architecture: str) -> None:
    assert isinstance(tree.forward_of(_model(architecture)), AsItIs)


def test_weights_of_large_models_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    monkeypatch.setattr(lean, "_PARAMETERS", model.num_parameters() - 1)
    assert isinstance(tree.forward_of(model), AsItIs)
