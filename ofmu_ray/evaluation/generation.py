"""Batched generation, greedy or sampled: what the model says to a prompt, token by token, until it ends the text."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, DynamicLayer

from ofmu_ray.evaluation.scoring import length_sorted
from ofmu_ray.models.answers import head_on

_COMPACT_BELOW = 0.75  # share of unfinished rows below which finished rows leave the batch


@dataclass(frozen=True)
class Draws:
    """Sampling at a temperature, each text from random numbers of its own: batches and their order do not enter."""

    temperature: float
    top_k: int
    """Only the likeliest so many tokens are drawn."""
    uniforms: np.ndarray
    """float64 [texts, tokens] in [0, 1)."""

    @classmethod
    def of(cls, names: Sequence[str], max_new_tokens: int, temperature: float, top_k: int) -> Draws:
        """The random numbers that belong to these names."""
        seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big") for name in names]
        return cls(temperature, top_k, np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds]))

    def tokens(self, logits_bv: torch.Tensor, rows: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        """int64 [rows, 1]: where each row's number of this step lies among the cumulated probabilities."""
        likeliest_bk, tokens_bk = logits_bv.double().topk(min(self.top_k, logits_bv.shape[1]))
        cumulated_bk = (likeliest_bk / self.temperature).softmax(1).cumsum(1)
        uniforms_b1 = torch.from_numpy(self.uniforms[list(rows), list(steps)])[:, None].to(logits_bv.device)
        at_b1 = torch.searchsorted(cumulated_bk, uniforms_b1 * cumulated_bk[:, -1:], right=True)
        return tokens_bk.gather(1, at_b1.clamp(max=tokens_bk.shape[1] - 1))


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's EOS and those of the model's generation configuration."""
    found = [tokenizer.eos_token_id]
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    found += ends if isinstance(ends, list) else [ends]
    return frozenset(int(token) for token in found if token is not None)


def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: frozenset[int], batch_size: int
) -> list[list[int]]:
    """New tokens per prompt, without the one that ended it; at most `max_new_tokens`.

    A text also ends where the model's positions do (`max_position_embeddings`). Equal to `model.generate` with
    `do_sample=False`, up to ties within rounding.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    for batch in length_sorted([len(prompt) for prompt in prompts], batch_size):
        new = generate_batch(model, [prompts[row] for row in batch], max_new_tokens=max_new_tokens, stop=stop)
        for row, tokens in zip(batch, new, strict=True):
            texts[row] = tokens
    return texts


@torch.inference_mode()
def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    draws: Draws | None = None,
) -> list[list[int]]:
    """`generate` for prompts that go through the model together, with `draws` sampled instead of greedy.

    Prompts are padded on the left.
    """
    device = model.get_input_embeddings().weight.device
    left = budgets(model, [len(prompt) for prompt in prompts], max_new_tokens)
    texts: list[list[int]] = [[] for _ in prompts]
    live = [row for row, budget in enumerate(left) if budget > 0]
    if live:
        longest = max(len(prompts[row]) for row in live)
        padding = [longest - len(prompts[row]) for row in live]
        ids = [[prompts[row][0]] * pad + list(prompts[row]) for row, pad in zip(live, padding, strict=True)]
        decoding = _Decoding(model, _cache(model), torch.tensor(ids, device=device), padding)
        while live:
            live = _run(decoding, live, texts, left, stop, draws)
    return texts


def _run(
    decoding: _Decoding,
    live: list[int],
    texts: list[list[int]],
    left: Sequence[int],
    stop: frozenset[int],
    draws: Draws | None,
) -> list[int]:
    """Append to the texts of `live` (the batch's rows in order) until many have ended; which have not.

    A text that has ended or used up what it may stays in the batch, unread, until the others are kept.
    """
    rows = len(live)
    going = list(range(rows))
    while going and len(going) >= _COMPACT_BELOW * rows:
        # a text that has ended goes on unread: any of its numbers will do
        steps = [min(len(texts[row]), left[row] - 1) for row in live]
        tokens = decoding.next_tokens(draws, live, steps)
        going = [at for at in going if _append(texts[live[at]], tokens[at], left[live[at]], stop)]
    decoding.keep(going)
    return [live[at] for at in going]


def _append(text: list[int], token: int, most: int, stop: frozenset[int]) -> bool:
    """Whether the text goes on after this token."""
    if token in stop:
        return False
    text.append(token)
    return len(text) < most


def budgets(model: Any, lengths: Sequence[int], max_new_tokens: int) -> list[int]:
    """Most new tokens after prompts of these lengths: where the model's positions end, texts end."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is None:
        return [max_new_tokens] * len(lengths)
    return [max(0, min(max_new_tokens, int(room) - length)) for length in lengths]


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in buffers that grow by doubling.

    transformers' own layer copies the whole cache at every token, nine tenths of the time of a small model.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_room, self.value_room = key_states[:, :, :0], value_states[:, :, :0]
        seen = self.get_seq_length()
        length = seen + key_states.shape[-2]
        self.key_room = _roomy(self.key_room, seen, length)
        self.value_room = _roomy(self.value_room, seen, length)
        self.key_room[:, :, seen:length] = key_states
        self.value_room[:, :, seen:length] = value_states
        self.keys, self.values = self.key_room[:, :, :length], self.value_room[:, :, :length]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        length = self.get_seq_length()
        self.key_room, self.value_room = self.key_room[indices], self.value_room[indices]
        self.keys, self.values = self.key_room[:, :, :length], self.value_room[:, :, :length]


def _roomy(room: torch.Tensor, used: int, length: int) -> torch.Tensor:
    """The buffer [rows, heads, positions, width] itself, or a larger copy when `length` positions do not fit."""
    if length <= room.shape[2]:
        return room
    larger = room.new_empty(room.shape[0], room.shape[1], max(64, 2 * length), room.shape[3])
    larger[:, :, :used] = room[:, :, :used]
    return larger


def _cache(model: Any) -> DynamicCache:
    """The model's own kind of cache, with roomy layers where its layers are plain ones."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _Decoding:
    """A batch in flight: its cache of keys and values, its padding, and the tokens that come next."""

    def __init__(self, model: Any, cache: DynamicCache, ids_bt: torch.Tensor, padding: Sequence[int]) -> None:
        self.model = model
        self.cache = cache
        self.inputs_bt = ids_bt
        self.padding_b = torch.tensor(padding, dtype=torch.long, device=ids_bt.device)
        self.length = 0
        self.padded = any(padding)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def next_tokens(self, draws: Draws | None, rows: Sequence[int], steps: Sequence[int]) -> list[int]:
        """The next token of each row, the most likely or a drawn one, which also becomes the next step's input."""
        seen, self.length = self.length, self.length + self.inputs_bt.shape[1]
        columns = torch.arange(self.length, device=self.inputs_bt.device)
        extra: dict[str, torch.Tensor] = {}
        if self.padded:
            extra["attention_mask"] = (columns >= self.padding_b[:, None]).long()
        if self.takes_positions:
            extra["position_ids"] = (columns[seen:] - self.padding_b[:, None]).clamp(min=0)
        with head_on(self.model, lambda hidden: hidden[:, -1:]):
            output = self.model(input_ids=self.inputs_bt, past_key_values=self.cache, use_cache=True, **extra)
        logits_bv = output.logits[:, -1]
        self.inputs_bt = draws.tokens(logits_bv, rows, steps) if draws else logits_bv.argmax(dim=-1, keepdim=True)
        return list(self.inputs_bt[:, 0].tolist())

    def keep(self, positions: Sequence[int]) -> None:
        """Drop every other row of the batch."""
        rows = torch.tensor(positions, dtype=torch.long, device=self.inputs_bt.device)
        self.cache.batch_select_indices(rows)
        self.inputs_bt, self.padding_b = self.inputs_bt[rows], self.padding_b[rows]
        self.padded = bool(self.padding_b.any())
