"""All texts of a row in one sequence: a tree of tokens that contains the prompt and every common prefix once.

Each token has its position and attends to its path from the root, through a 4-D attention mask (tree attention, as in
speculative decoding: SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, DynamicLayer

from ofmu_ray.models.answers import Text, answer_logits, logits_at


@dataclass(frozen=True)
class Tree:
    """The texts of a row. Node 0 is the first token of the prompt, which all texts share; nodes follow in text order.

    The last token of a text is not a node: nothing is predicted from it.
    """

    prompt: int
    """Tokens of the prompt: the nodes before this number."""
    tokens: list[int]
    depths: list[int]
    """Position of each node in its text."""
    branches: dict[tuple[int, int], int]
    """(node, next token) -> node, where a text branches off; otherwise the next node follows."""
    ends: set[int]
    """Nodes not followed by the next one."""
    paths: list[list[int]]
    """Per text, the nodes of its answer."""
    fresh: list[int]
    """Per text, the number of nodes at the end of its path that are new."""
    answers: list[list[int]]
    """Per text, the tokens of its answer."""

    def child(self, node: int, token: int) -> int | None:
        """The node for this token after `node`."""
        if node not in self.ends and self.tokens[node + 1] == token:
            return node + 1
        return self.branches.get((node, token))

    def predictors(self, text: int) -> list[int]:
        """The nodes that predict the tokens of the text's answer."""
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


def takes_trees(model: Any) -> bool:
    """Whether the model's forward pass over a tree gives the logits of its texts: inspected, then tried on two trees.

    The model must accept positions and custom masks, and use plain caches (no sliding windows, no recurrent states).
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    texts = [
        ([token % vocabulary for token in ids], prompt)
        for ids, prompt in (([3, 5, 7, 11, 13, 2], 2), ([3, 5, 7, 11, 17, 2], 2), ([19, 23, 2], 1))
    ]
    try:
        actual = tree_logits(model, [tree_of(texts[:2]), tree_of(texts[2:])]).double()
    except (ValueError, RuntimeError):  # flash attention has no masks
        return False
    with torch.no_grad():
        alone = [answer_logits(model, [text])[0] for text in texts]
    expected = torch.cat([alone[0], alone[1][-1:], alone[2]]).double()
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    return bool((actual - expected).norm() <= tolerance * expected.norm())


@torch.no_grad()
def tree_logits(model: Any, trees: Sequence[Tree]) -> torch.Tensor:
    """Logits of all nodes from the prompts' last on, tree by tree, [nodes, vocabulary], in one forward pass."""
    weight = model.get_input_embeddings().weight
    shape = len(trees), max(len(tree.tokens) for tree in trees)
    ids_bt, depths_bt, predicts_bt = (np.zeros(shape, dtype=kind) for kind in (np.int64, np.int64, bool))
    hidden_bqk = np.ones((*shape, shape[1]), dtype=bool)
    hidden_bqk[:, range(shape[1]), range(shape[1])] = False  # padding sees itself
    for row, tree in enumerate(trees):
        size, prompt = len(tree.tokens), tree.prompt
        ids_bt[row, :size], depths_bt[row, :size] = tree.tokens, tree.depths
        predicts_bt[row, prompt - 1 : size] = True
        hidden_bqk[row, :prompt, :prompt] = ~np.tri(prompt, dtype=bool)
        hidden_bqk[row, prompt:size, :prompt] = False
        first = prompt
        for path, fresh in zip(tree.paths, tree.fresh, strict=True):
            new = slice(first, first + fresh)
            hidden_bqk[row, new, path[: len(path) - fresh]] = False
            hidden_bqk[row, new, new] = ~np.tri(fresh, dtype=bool)
            first += fresh
    hidden = torch.from_numpy(hidden_bqk).to(weight.device)
    mask = torch.zeros(hidden.shape, dtype=weight.dtype, device=weight.device)
    batch = {
        "input_ids": torch.from_numpy(ids_bt).to(weight.device),
        "position_ids": torch.from_numpy(depths_bt).to(weight.device),
        "attention_mask": mask.masked_fill_(hidden, torch.finfo(weight.dtype).min)[:, None],
    }
    return logits_at(model, batch, torch.from_numpy(predicts_bt).to(weight.device))
