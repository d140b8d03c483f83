"""All texts of a row in one pass: a tree of tokens in which the prompt and every common beginning stand once.

The tokens of several trees lie one after another, without padding, in a single sequence; each sees the tokens on its
own path from the root (tree attention, as in speculative decoding: SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from ofmu_ray.evaluation.scoring import Text, head_on

_ATTENTION = "ofmu_tree"
_SAME_WIDTH = 0.7  # paths share one attention call when the shorter has at least this share of the longer's new tokens


_HARMLESS = {"dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions"}
"""Options of an attention call that change nothing here: no dropout in evaluation, the trees say who sees whom."""


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
    children: dict[tuple[int, int], int]
    """(node, next token) -> node."""
    paths: list[list[int]]
    """Per text, the nodes of its answer."""
    fresh: list[int]
    """Per text, how many nodes at the end of its path no earlier text has."""
    answers: list[list[int]]
    """Per text, the tokens of its answer."""

    def predictors(self, text: int) -> list[int]:
        """The node from which each token of the text's answer is predicted."""
        return [self.prompt - 1, *self.paths[text]]


def tree_of(texts: Sequence[Text]) -> Tree:
    """The tree of texts with the same prompt."""
    ids, prompt = texts[0]
    tree = Tree(prompt, list(ids[:prompt]), list(range(prompt)), {}, [], [], [])
    for ids, start in texts:
        if start != prompt or list(ids[:start]) != tree.tokens[:prompt] or not 0 < start < len(ids):
            raise AssertionError("the texts of a tree need the same prompt and an answer each")
        node, path, first = prompt - 1, [], len(tree.tokens)
        for depth in range(start, len(ids) - 1):
            edge = node, ids[depth]
            if edge not in tree.children:
                tree.children[edge] = len(tree.tokens)
                tree.tokens.append(ids[depth])
                tree.depths.append(depth)
            node = tree.children[edge]
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


class _Layout(NamedTuple):
    """The attention calls of a pass, and what a model asked of them that they do not do."""

    groups: Sequence[_Group]
    ignored: set[str]


_layout: ContextVar[_Layout] = ContextVar("layout")


def _tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """[1, heads, nodes, width] each -> [1, nodes, heads, width], for transformers' AttentionInterface."""
    layout = _layout.get()
    layout.ignored.update(name for name, value in options.items() if value is not None and name not in _HARMLESS)
    query_nhd, key_nhd, value_nhd = (states[0].transpose(0, 1) for states in (query, key, value))
    found = value.new_empty(query_nhd.shape[0], query_nhd.shape[1], value.shape[-1])
    repeats = query.shape[1] // key.shape[1]
    for group in layout.groups:
        queries = _gathered(query_nhd, group.queries, group.paths)
        keys, values = (_gathered(states, group.keys, group.paths) for states in (key_nhd, value_nhd))
        if repeats > 1:
            keys, values = (states.repeat_interleave(repeats, dim=1) for states in (keys, values))
        mask = None if group.mask is None else group.mask.to(query.dtype)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        found[group.nodes] = attended.transpose(1, 2).flatten(0, 1)[group.real]
    return found[None], None


def _gathered(states_nhd: torch.Tensor, nodes: torch.Tensor, paths: int) -> torch.Tensor:
    """[nodes, heads, width] -> [paths, heads, places, width]."""
    found = states_nhd.index_select(0, nodes)
    return found.view(paths, -1, *found.shape[1:]).transpose(1, 2)


AttentionInterface.register(_ATTENTION, _tree_attention)


def _grouped(trees: Sequence[Tree], device: torch.device) -> list[_Group]:
    whole: list[tuple[int, Sequence[int]]] = []  # (new nodes, nodes of the path)
    branches: list[tuple[int, Sequence[int]]] = []
    offset = 0
    for tree in trees:
        prompt = range(offset, offset + tree.prompt)
        for number, (path, fresh) in enumerate(zip(tree.paths, tree.fresh, strict=True)):
            nodes = [*prompt, *(node + offset for node in path)]
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


def _group(paths: Sequence[tuple[int, Sequence[int]]], causal: bool, device: torch.device) -> _Group:
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
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if can_set is None or not can_set() or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    ids = [[token % vocabulary for token in text] for text in ([3, 5, 7, 11, 13, 2], [3, 5, 7, 11, 17, 2], [19, 23, 2])]
    trees = [tree_of([(ids[0], 2), (ids[1], 2)]), tree_of([(ids[2], 1)])]
    found, _, ignored = tree_logits(model, trees)
    device = found.device
    with torch.inference_mode():
        alone = [model(input_ids=torch.tensor([text[:-1]], device=device), use_cache=False).logits[0] for text in ids]
    expected = torch.cat([alone[0][1:], alone[1][-1:], alone[2]]).double()
    tolerance = 1e-3 if found.dtype == torch.float32 else 5e-2
    return not ignored and bool((found.double() - expected).norm() <= tolerance * expected.norm())


class TreePass(NamedTuple):
    """What a forward of trees leaves."""

    logits_nv: torch.Tensor
    """Of every node from the prompts' last ones on, tree by tree, [nodes, vocabulary]."""
    cache: DynamicCache
    """Keys and values of all nodes, [1, heads, nodes, width] per layer."""
    ignored: set[str]
    """Options of the model's attention that were not heeded (see `takes_trees`)."""


@torch.inference_mode()
def tree_logits(model: Any, trees: Sequence[Tree]) -> TreePass:
    """One forward of all trees, for a model that takes them."""
    device = model.get_input_embeddings().weight.device
    sizes = [len(tree.tokens) for tree in trees]
    ends = np.cumsum(sizes)
    predicts = [np.arange(e - n + t.prompt - 1, e) for t, n, e in zip(trees, sizes, ends, strict=True)]
    nodes = torch.from_numpy(np.concatenate(predicts)).to(device)
    ids = torch.tensor([[token for tree in trees for token in tree.tokens]], device=device)
    positions = torch.tensor([[depth for tree in trees for depth in tree.depths]], device=device)
    cache = DynamicCache(config=model.config)
    layout = _Layout(_grouped(trees, device), set())
    token = _layout.set(layout)
    try:
        with attending(model, _ATTENTION), head_on(model, lambda hidden: hidden[:, nodes]):
            logits = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
    finally:
        _layout.reset(token)
    return TreePass(logits if len(logits) == len(nodes) else logits[nodes], cache, layout.ignored)


@contextmanager
def attending(model: Any, how: str) -> Iterator[None]:
    """Within the context the model's attention is the one registered under this name."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(how)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
