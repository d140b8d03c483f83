"""The forward of a small model of Llama's kind in fewer operations, for the time of an evaluation on a processor.

A small model spends more of its time on transformers' bookkeeping and on element-wise operations than a large one.
Here queries, keys and values are one product, the weights of the norms are part of the products that follow them,
rotary embedding is one complex product, residuals are added by the product that makes them, and the last layer ends
early for tokens that predict nothing. Whether a model is of that kind is found out from its modules, then by trying
(`tree.forward_of`); every other model runs as it is. The weights are copied; the model itself is never changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ofmu_ray.evaluation.forward import Attend

_PARAMETERS = 1 << 26  # of the largest model whose weights are copied (256 MiB); beyond it products take all the time
_LINEAR = {
    "lm_head",
    *(f"model.layers.#.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.#.mlp.{name}_proj" for name in ("gate", "up", "down")),
}
_NORMS = {"model.norm", "model.layers.#.input_layernorm", "model.layers.#.post_attention_layernorm"}
_OTHERS = {
    *("", "model", "model.embed_tokens", "model.layers", "model.rotary_emb"),
    *(f"model.layers.#{name}" for name in ("", ".self_attn", ".mlp", ".mlp.act_fn")),
}
"""The modules of a model of Llama's kind: these and no others."""


class Product(NamedTuple):
    """x -> x @ weight.T + bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.weight, self.bias)

    def onto(self, sum_nd: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """`sum_nd` plus the product, in place."""
        return (sum_nd if self.bias is None else sum_nd.add_(self.bias)).addmm_(states, self.weight.T)


class _Layer(NamedTuple):
    qkv: Product
    """Of queries and keys, the two dimensions that rotary embedding turns together are neighbours."""
    out: Product
    gate: Product
    up: Product
    down: Product
    activation: Any
    epsilons: tuple[float, float]
    """Of the norms before attention and before the MLP."""
    scale: float
    """Of attention's scores."""


class Lean:
    """A `Forward` of a model for which `is_llama_like` holds, with a copy of its weights as they are now."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.body = model.model
        self.width = int(self.body.layers[0].self_attn.head_dim)
        attention = self.body.layers[0].self_attn
        self.parts = [
            each.out_features // self.width for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        """Heads of queries, keys, values."""
        with torch.no_grad():
            self.layers = [self._layer(layer) for layer in self.body.layers]
            self.head = _after(self.body.norm, [model.lm_head])
        self.epsilon = float(self.body.norm.variance_epsilon)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        turned = [_neighbours(each, self.width) for each in (attention.q_proj, attention.k_proj)]
        return _Layer(
            qkv=_after(layer.input_layernorm, [*turned, attention.v_proj]),
            out=Product(attention.o_proj.weight, attention.o_proj.bias),
            gate=_after(layer.post_attention_layernorm, [mlp.gate_proj]),
            up=_after(layer.post_attention_layernorm, [mlp.up_proj]),
            down=Product(mlp.down_proj.weight, mlp.down_proj.bias),
            activation=mlp.act_fn,
            epsilons=(layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon),
            scale=attention.scaling,
        )

    def __call__(
        self, ids_n: torch.Tensor, positions_n: torch.Tensor, attend: Attend, predicting_m: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Forward`."""
        sum_nd = functional.embedding(ids_n, self.body.embed_tokens.weight)
        turns = self._turns(sum_nd, positions_n)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(_normed(sum_nd, layer.epsilons[0]))
            torch.view_as_complex(qkv[:, : 2 * turns.shape[1]].view(len(ids_n), -1, 2)).mul_(turns)
            query, key, value = torch.split(qkv.view(len(ids_n), -1, self.width), self.parts, dim=1)
            attended_nd = attend(number, query, key, value, layer.scale).flatten(1)
            if predicting_m is not None and number == len(self.layers) - 1:
                sum_nd, attended_nd = sum_nd[predicting_m], attended_nd[predicting_m]
            layer.out.onto(sum_nd, attended_nd)
            normed_nd = _normed(sum_nd, layer.epsilons[1])
            layer.down.onto(sum_nd, layer.activation(layer.gate(normed_nd)).mul_(layer.up(normed_nd)))
        return self.head(_normed(sum_nd, self.epsilon))

    def _turns(self, states_nd: torch.Tensor, positions_n: torch.Tensor) -> torch.Tensor:
        """The factors of all queries' and keys' pairs of dimensions, [tokens, pairs] complex."""
        pairs = self.width // 2
        cos, sin = (each[0, :, :pairs] for each in self.body.rotary_emb(states_nd[None], positions_n[None]))
        return torch.complex(cos, sin).repeat(1, sum(self.parts[:2]))


def _normed(states_nd: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean x^2 + epsilon)."""
    norm_n1 = torch.linalg.vector_norm(states_nd, dim=-1, keepdim=True)
    factor_n1: torch.Tensor = norm_n1.square_().div_(states_nd.shape[1]).add_(epsilon).rsqrt_()
    return states_nd * factor_n1


def _after(norm: Any, linears: Sequence[Any]) -> Product:
    """The products of normalised states as one, the norm's weight included."""
    biases = [each.bias for each in linears]
    whole = [
        torch.zeros(len(linear.weight)) if bias is None else bias for linear, bias in zip(linears, biases, strict=True)
    ]
    weight = torch.cat([each.weight for each in linears]) * norm.weight
    return Product(weight, None if all(bias is None for bias in biases) else torch.cat(whole))


def _neighbours(linear: Any, width: int) -> Product:
    """The linear layer, within each head its first half's dimensions alternating with its second half's."""
    weight = linear.weight.view(-1, 2, width // 2, linear.weight.shape[1]).transpose(1, 2).reshape(linear.weight.shape)
    if linear.bias is None:
        return Product(weight, None)
    return Product(weight, linear.bias.view(-1, 2, width // 2).transpose(1, 2).flatten())


def is_llama_like(model: Any) -> bool:
    """Whether `Lean` can read the model: a small fp32 one on a processor, its modules Llama's, no hooks or adapters.

    What the modules compute only trying tells.
    """
    modules: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        modules.setdefault(re.sub(r"\.\d+", ".#", name), []).append(module)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    parameters = list(model.parameters())
    if modules.keys() != _LINEAR | _NORMS | _OTHERS or sum(each.numel() for each in parameters) > _PARAMETERS:
        return False
    if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in parameters):
        return False
    if any(type(module) is not nn.Linear for name in _LINEAR for module in modules[name]):
        return False
    if not all(hasattr(module, "variance_epsilon") for name in _NORMS for module in modules[name]):
        return False
    attentions = modules["model.layers.#.self_attn"]
    if not all(hasattr(module, "head_dim") and hasattr(module, "scaling") for module in attentions):
        return False
    weight = model.get_input_embeddings().weight
    cos, _ = model.model.rotary_emb(weight[None, :1], torch.zeros(1, 1, dtype=torch.long))
    return type(model.model.embed_tokens) is nn.Embedding and cos.shape[-1] == attentions[0].head_dim
