"""All texts of a row in one pass: a tree of tokens in which the prompt and every common beginning stand once.

The tokens of several trees lie one after another, without padding, in a single sequence; each sees the tokens on its
own path from the root (tree attention, as in speculative decoding: SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import DynamicCache, DynamicLayer

from ofmu_ray.internals.transformers_private import takes_attention
from ofmu_ray.models.answers import Text
from ofmu_ray.models.forward import Forward

_SAME_WIDTH = 0.8  # paths share one attention call when the shorter has at least this share of the longer's new tokens


@dataclass(frozen=True)
class Tree:
    """The texts of a row. Node 0 is the first token of the prompt, which all texts share; nodes follow in text order.

    The last token of a text is no node: nothing is predicted from it.
    """

    prompt: int
    """Tokens of the prompt: the nodes before this number."""
    tokens: list[int]
    depths: list[int]
    """Position of each node in its text."""
    branches: dict[tuple[int, int], int]
    """(node, next token) -> node, where a text leaves those before it; otherwise a node is followed by the next one."""
    ends: set[int]
    """Nodes that the next one does not follow."""
    paths: list[list[int]]
    """Per text, the nodes of its answer."""
    fresh: list[int]
    """Per text, how many nodes at the end of its path no earlier text has."""
    answers: list[list[int]]
    """Per text, the tokens of its answer."""

    def child(self, node: int, token: int) -> int | None:
        """The node of this token after a node."""
        if node not in self.ends and self.tokens[node + 1] == token:
            return node + 1
        return self.branches.get((node, token))

    def predictors(self, text: int) -> list[int]:
        """The node from which each token of the text's answer is predicted."""
        return [self.prompt - 1, *self.paths[text]]


def tree_of(texts: Sequence[Text]) -> Tree:
    """The tree of texts with the same prompt."""
    ids, prompt = texts[0]
    tree = Tree(prompt, list(ids[:prompt]), list(range(prompt)), {}, {prompt - 1}, [], [], [])
    for ids, start in texts:
        if start != prompt or list(ids[:start]) != tree.tokens[:prompt] or not 0 < start < len(ids):
            raise AssertionError("the texts of a tree need the same prompt and an answer each")
        path: list[int] = []
        node, first, last = prompt - 1, len(tree.tokens), len(ids) - 1
        for depth in range(start, last):
            child = tree.child(node, ids[depth])
            if child is None:
                tree.branches[node, ids[depth]] = first
                tree.tokens.extend(ids[depth:last])
                tree.depths.extend(range(depth, last))
                tree.ends.add(len(tree.tokens) - 1)
                path.extend(range(first, len(tree.tokens)))
                break
            node = child
            path.append(node)
        tree.paths.append(path)
        tree.fresh.append(len(tree.tokens) - first)
        tree.answers.append(list(ids[start:]))
    return tree


# --------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Group:
    """Paths that go through one attention call: their new nodes [paths, q] look at all their nodes [paths, k]."""

    queries: torch.Tensor
    """Nodes, padded on the right with node 0, [paths * q]."""
    keys: torch.Tensor
    """[paths * k]."""
    mask: torch.Tensor | None
    """Added to the scores, [paths, 1, q, k]; None: path and new nodes are the same (causal)."""
    paths: int
    real: torch.Tensor
    """Places in `queries` that are no padding."""
    nodes: torch.Tensor
    """The nodes at these places."""


class _TreeAttention:
    """Attention of one pass over trees; keeps every layer's keys and values, [nodes, key heads, width]."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self.groups = groups
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(
        self, layer: int, query_nhd: torch.Tensor, key_nkd: torch.Tensor, value_nkd: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        self.states.append((key_nkd, value_nkd))
        found = value_nkd.new_empty(query_nhd.shape[0], query_nhd.shape[1], value_nkd.shape[-1])
        repeats = query_nhd.shape[1] // key_nkd.shape[1]
        for group in self.groups:
            queries = _gathered(query_nhd, group.queries, group.paths)
            keys, values = (_gathered(states, group.keys, group.paths) for states in (key_nkd, value_nkd))
            if repeats > 1:
                keys, values = (states.repeat_interleave(repeats, dim=1) for states in (keys, values))
            mask = None if group.mask is None else group.mask.to(queries.dtype)
            attended = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
            )
            kept = attended.transpose(1, 2).flatten(0, 1).index_select(0, group.real)
            found.index_copy_(0, group.nodes, kept.to(found.dtype))
        return found


def _gathered(states_nhd: torch.Tensor, nodes: torch.Tensor, paths: int) -> torch.Tensor:
    """[nodes, heads, width] -> [paths, heads, places, width]."""
    found = states_nhd.index_select(0, nodes)
    return found.view(paths, -1, *found.shape[1:]).transpose(1, 2)


_Path = tuple[int, "np.ndarray[Any, np.dtype[np.int64]]"]
"""How many nodes are new, and the nodes of the path."""


def _grouped(trees: Sequence[Tree], device: torch.device) -> list[_Group]:
    whole: list[_Path] = []
    branches: list[_Path] = []
    offset = 0
    for tree in trees:
        for number, (path, fresh) in enumerate(zip(tree.paths, tree.fresh, strict=True)):
            nodes = np.array([*range(tree.prompt), *path]) + offset
            if number == 0:
                whole.append((len(nodes), nodes))
            elif fresh:
                branches.append((fresh, nodes))
        offset += len(tree.tokens)
    groups = []
    for kind in (whole, branches):
        kind.sort(key=lambda path: (-path[0], -len(path[1])))
        start = 0
        while start < len(kind):
            least = _SAME_WIDTH * kind[start][0]
            end = next((at for at in range(start, len(kind)) if kind[at][0] < least), len(kind))
            groups.append(_group(kind[start:end], kind is whole, device))
            start = end
    return groups


def _group(paths: Sequence[_Path], causal: bool, device: torch.device) -> _Group:
    fresh = np.array([new for new, _ in paths])
    lengths = np.array([len(nodes) for _, nodes in paths])
    keys = np.zeros((len(paths), lengths.max()), dtype=np.int64)
    queries = np.zeros((len(paths), fresh.max()), dtype=np.int64)
    for place, (new, nodes) in enumerate(paths):
        keys[place, : len(nodes)] = nodes
        queries[place, :new] = nodes[-new:]
    real = np.flatnonzero(np.arange(queries.shape[1]) < fresh[:, None])
    mask = None
    if not causal:
        last_seen = (lengths - fresh)[:, None] + np.arange(queries.shape[1])
        hidden = np.arange(keys.shape[1]) > last_seen[:, :, None]
        mask = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), -torch.inf)[:, None].to(device)
    return _Group(
        queries=torch.from_numpy(queries.ravel()).to(device),
        keys=torch.from_numpy(keys.ravel()).to(device),
        mask=mask,
        paths=len(paths),
        real=torch.from_numpy(real).to(device),
        nodes=torch.from_numpy(queries.ravel()[real]).to(device),
    )


# -------------------------------------------------------------------------------------------------------- the forward


def takes_trees(model: Any) -> bool:
    """Whether the model's forward of a tree gives the logits of its texts: looked up, then tried.

    It needs positions as an argument, attention by transformers' AttentionInterface and plain caches (no sliding
    windows, no recurrent states). A pass over two small trees tells the rest: the model must ask its attention for
    nothing more (score caps, biases, sinks), and the logits must be those of the texts one by one.
    """
    if not takes_attention(model) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    forward, texts = Forward(model), _trial_texts(model)
    found = tree_logits(forward, _trial_trees(texts)).logits_nv
    with torch.inference_mode():
        alone = [
            model(input_ids=torch.tensor([text[:-1]], device=found.device), use_cache=False).logits[0] for text in texts
        ]
    expected = torch.cat([alone[0][1:], alone[1][-1:], alone[2]])
    return not forward.ignored and _differ(found, expected) <= (1e-3 if found.dtype == torch.float32 else 5e-2)


def _trial_texts(model: Any) -> list[list[int]]:
    vocabulary = model.config.get_text_config().vocab_size
    return [
        [token % vocabulary for token in text] for text in ([3, 5, 7, 11, 13, 2], [3, 5, 7, 11, 17, 2], [19, 23, 2])
    ]


def _trial_trees(texts: Sequence[Sequence[int]]) -> list[Tree]:
    return [tree_of([(texts[0], 2), (texts[1], 2)]), tree_of([(texts[2], 1)])]


def _differ(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; infinite where one of them is not finite."""
    distance = float((found.double() - expected.double()).norm() / expected.double().norm())
    return distance if math.isfinite(distance) else math.inf


class TreePass(NamedTuple):
    """What a forward of trees leaves."""

    logits_nv: torch.Tensor
    """Of every node from the prompts' last ones on, tree by tree, [nodes, vocabulary]."""
    states: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of all nodes, [nodes, key heads, width] per layer."""


@torch.inference_mode()
def tree_logits(forward: Forward, trees: Sequence[Tree]) -> TreePass:
    """One forward of all trees, for a model that takes them."""
    device = forward.model.get_input_embeddings().weight.device
    sizes = [len(tree.tokens) for tree in trees]
    ends = np.cumsum(sizes)
    predicts = [np.arange(e - n + t.prompt - 1, e) for t, n, e in zip(trees, sizes, ends, strict=True)]
    nodes = torch.from_numpy(np.concatenate(predicts)).to(device)
    ids = torch.tensor([token for tree in trees for token in tree.tokens], device=device)
    positions = torch.tensor([depth for tree in trees for depth in tree.depths], device=device)
    attention = _TreeAttention(_grouped(trees, device))
    return TreePass(forward(ids, positions, attention, nodes), attention.states)
