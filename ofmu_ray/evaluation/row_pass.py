"""One pass over the tree of a row: the scores of all its texts, and the start of its generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ofmu_ray.evaluation.scoring import TokenScores, most_likely, scores_of
from ofmu_ray.models.room import logits_at_once, rows_at_once
from ofmu_ray.models.tree import Tree, tree_logits

_NODES = {"cpu": 2048, "cuda": 16384}  # nodes per pass, including padding


class RowValues(NamedTuple):
    """A row's values from teacher-forced passes."""

    answer: TokenScores
    """Scores of the first text, the right answer."""
    other_nll: list[float]
    """Mean token loss of every other text (nats, including EOS)."""
    generated: list[int]
    """New tokens of the greedy generation as long as it follows the row's texts, and one more."""
    complete: bool
    """Whether this is the complete generation."""


def row_values(model: Any, trees: Sequence[Tree], stop: frozenset[int], max_new_tokens: int) -> list[RowValues]:
    """Values of the row of every tree, in order."""
    values: dict[int, RowValues] = {}
    for batch in _batches(model, trees):
        results = _pass(model, [trees[row] for row in batch], stop, max_new_tokens)
        values.update(zip(batch, results, strict=True))
    return [values[row] for row in range(len(trees))]


def _batches(model: Any, trees: Sequence[Tree]) -> Iterator[list[int]]:
    """Rows whose trees share a pass: of similar size, with logits that fit in memory."""
    device = model.get_input_embeddings().weight.device
    nodes = _NODES["cuda" if device.type == "cuda" else "cpu"]
    predictors = logits_at_once(device) // model.config.get_text_config().vocab_size
    batch: list[int] = []
    predicting = 0
    for row in sorted(range(len(trees)), key=lambda row: -len(trees[row].tokens)):
        predicts = len(trees[row].tokens) - trees[row].prompt + 1
        full = batch and (len(batch) + 1) * len(trees[batch[0]].tokens) > nodes
        if batch and (full or predicting + predicts > predictors):
            yield batch
            batch, predicting = [], 0
        batch.append(row)
        predicting += predicts
    if batch:
        yield batch


@torch.no_grad()
def _pass(model: Any, trees: Sequence[Tree], stop: frozenset[int], max_new_tokens: int) -> list[RowValues]:
    logits_nv = tree_logits(model, trees)
    first = np.cumsum([0] + [len(tree.tokens) - tree.prompt + 1 for tree in trees])  # each tree's first predictor
    texts = [
        (tree, first[row] - tree.prompt + 1, text) for row, tree in enumerate(trees) for text in range(len(tree.paths))
    ]
    places_n, targets_n, counts = _places([each for each in texts if each[2] == 0], logits_nv.device)
    answers = scores_of(logits_nv[places_n], targets_n, counts)
    others = [each for each in texts if each[2] > 0]
    losses = iter(_nll(logits_nv, _normaliser(logits_nv), others))
    best = most_likely(logits_nv).tolist()
    return [
        RowValues(
            answers[row],
            [next(losses) for _ in tree.paths[1:]],
            *_start(tree, best[first[row] : first[row + 1]], stop, max_new_tokens),
        )
        for row, tree in enumerate(trees)
    ]


_Texts = Sequence[tuple[Tree, int, int]]
"""(tree, offset of its nodes in the logits, index of the text)."""


def _places(texts: _Texts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Place in the logits [n] and token [n] of every answer token of the texts, and the tokens per text."""
    places = np.concatenate([np.array(tree.predictors(text)) + shift for tree, shift, text in texts])
    targets = np.concatenate([np.array(tree.answers[text]) for tree, _, text in texts])
    counts = [len(tree.answers[text]) for tree, _, text in texts]
    return torch.from_numpy(places).to(device), torch.from_numpy(targets).to(device), counts


def _normaliser(logits_nv: torch.Tensor) -> torch.Tensor:
    """log of the sum of exponentials, [n]."""
    sums = []
    for chunk in torch.split(logits_nv, max(128, rows_at_once(logits_nv)) if logits_nv.is_cuda else 128):
        chunk = chunk.float()
        # log_softmax takes half the time of logsumexp on a CPU
        sums.append(chunk.amax(dim=-1) - chunk.log_softmax(dim=-1).amax(dim=-1))
    return torch.cat(sums)


def _nll(logits_nv: torch.Tensor, normaliser_n: torch.Tensor, texts: _Texts) -> list[float]:
    if not texts:
        return []
    places_n, targets_n, counts = _places(texts, logits_nv.device)
    nll_n = (normaliser_n[places_n] - logits_nv[places_n, targets_n].float()).double().cpu().numpy()
    starts = np.cumsum([0, *counts[:-1]])
    return [float(value) for value in np.add.reduceat(nll_n, starts) / counts]


def _start(tree: Tree, best: Sequence[int], stop: frozenset[int], most: int) -> tuple[list[int], bool]:
    """The most likely tokens after the prompt, as long as they are nodes of the tree; and whether the text ends."""
    node: int | None = tree.prompt - 1
    tokens: list[int] = []
    while node is not None and len(tokens) < most:
        token = best[node - tree.prompt + 1]
        if token in stop:
            return tokens, True
        tokens.append(token)
        node = tree.child(node, token)
    return tokens, len(tokens) >= most
