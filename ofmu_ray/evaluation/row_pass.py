"""What one pass over a row's tree gives: the scores of all its texts, and the beginning of its generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ofmu_ray.evaluation.continuation import Begun, States
from ofmu_ray.evaluation.scoring import LOGITS_AT_ONCE, TokenScores, most_likely, scores_of
from ofmu_ray.models.forward import Forward
from ofmu_ray.models.tree import Tree, tree_logits

_NODES = {"cpu": 1024, "cuda": 16384}  # nodes of one pass: small ones stay in a processor's second cache


class RowValues(NamedTuple):
    """A row's values from one teacher-forced pass."""

    answer: TokenScores
    """Of the first text, the right answer."""
    other_nll: list[float]
    """Mean token loss of every other text (nats, EOS counted)."""
    begun: Begun
    """The greedy generation, as far as it stays on the row's own texts."""


def row_values(
    forward: Forward, trees: Sequence[Tree], budgets: Sequence[int], stop: frozenset[int]
) -> Iterator[RowValues]:
    """Values of every tree's row, in order. `budgets`: most new tokens of each generation."""
    model = forward.model
    vocabulary = model.config.get_text_config().vocab_size
    nodes = _NODES["cuda" if model.get_input_embeddings().weight.is_cuda else "cpu"]
    start = 0
    for end in _ends(trees, nodes, LOGITS_AT_ONCE // vocabulary):
        yield from _pass(forward, trees[start:end], budgets[start:end], stop)
        start = end


def _ends(trees: Sequence[Tree], nodes: int, predictors: int) -> Iterator[int]:
    """Where each pass ends: at most so many nodes and predictors, at least one tree."""
    used = predicting = 0
    for number, tree in enumerate(trees):
        size, predicts = len(tree.tokens), len(tree.tokens) - tree.prompt + 1
        if used and (used + size > nodes or predicting + predicts > predictors):
            yield number
            used = predicting = 0
        used, predicting = used + size, predicting + predicts
    yield len(trees)


@torch.inference_mode()
def _pass(forward: Forward, trees: Sequence[Tree], budgets: Sequence[int], stop: frozenset[int]) -> list[RowValues]:
    logits_nv, states = tree_logits(forward, trees)
    first = np.cumsum([0] + [len(tree.tokens) - tree.prompt + 1 for tree in trees])  # each tree's first predictor
    texts = [
        (tree, first[row] - tree.prompt + 1, text) for row, tree in enumerate(trees) for text in range(len(tree.paths))
    ]
    places_n, targets_n, counts = _places([each for each in texts if each[2] == 0], logits_nv.device)
    answers = scores_of(logits_nv[places_n], targets_n, counts)
    others = [each for each in texts if each[2] > 0]
    losses = iter(_nll(logits_nv, _normaliser(logits_nv), others))
    best = most_likely(logits_nv).tolist()
    values, offset = [], 0
    for row, tree in enumerate(trees):
        begun = _begin(tree, best[first[row] : first[row + 1]], budgets[row], stop, states, offset)
        values.append(RowValues(answers[row], [next(losses) for _ in tree.paths[1:]], begun))
        offset += len(tree.tokens)
    return values


_Texts = Sequence[tuple[Tree, int, int]]
"""(tree, what to add to its nodes to get places in the logits, number of the text)."""


def _places(texts: _Texts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Place in the logits [n] and token [n] of every token of the texts' answers, and how many each text has."""
    places = np.concatenate([np.array(tree.predictors(text)) + shift for tree, shift, text in texts])
    targets = np.concatenate([np.array(tree.answers[text]) for tree, _, text in texts])
    counts = [len(tree.answers[text]) for tree, _, text in texts]
    return torch.from_numpy(places).to(device), torch.from_numpy(targets).to(device), counts


def _normaliser(logits_nv: torch.Tensor) -> torch.Tensor:
    """log of the sum of exponentials, [n]."""
    sums = []
    for chunk in torch.split(logits_nv, 128):
        chunk = chunk.float()
        # log_softmax takes half the time of logsumexp on a processor
        sums.append(chunk.amax(dim=-1) - chunk.log_softmax(dim=-1).amax(dim=-1))
    return torch.cat(sums)


def _nll(logits_nv: torch.Tensor, normaliser_n: torch.Tensor, texts: _Texts) -> list[float]:
    if not texts:
        return []
    places_n, targets_n, counts = _places(texts, logits_nv.device)
    nll_n = (normaliser_n[places_n] - logits_nv[places_n, targets_n].float()).double().cpu().numpy()
    starts = np.cumsum([0, *counts[:-1]])
    return [float(value) for value in np.add.reduceat(nll_n, starts) / counts]


def _begin(tree: Tree, best: Sequence[int], budget: int, stop: frozenset[int], states: States, offset: int) -> Begun:
    """Follow the most likely tokens from the prompt's end for as long as they are nodes of the tree."""
    node, nodes = tree.prompt - 1, list(range(tree.prompt))
    tokens: list[int] = []
    while len(tokens) < budget:
        token = best[node - tree.prompt + 1]
        if token in stop:
            return Begun(tokens, None)
        tokens.append(token)
        child = tree.child(node, token)
        if child is None:
            break
        node = child
        nodes.append(node)
    if len(tokens) >= budget:
        return Begun(tokens, None)
    return Begun(tokens, states, [node + offset for node in nodes])
