"""Batched generation, greedy or sampled."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig

from ofmu_ray.evaluation.scoring import length_sorted
from ofmu_ray.internals.transformers_private import is_stateful
from ofmu_ray.metrics.degeneration import ngram_entropy
from ofmu_ray.metrics.functions import repetition

_COMPACT_BELOW = 0.7  # below this share of unfinished texts, finished ones leave the batch


@dataclass(frozen=True)
class Sampling:
    """Sampling at a temperature. Each text has its own random numbers, so batches and their order do not matter."""

    temperature: float
    top_k: int
    """Sample from this many most likely tokens."""
    uniforms: np.ndarray
    """float64 [texts, tokens] in [0, 1)."""

    @classmethod
    def of(cls, names: Sequence[str], max_new_tokens: int, temperature: float, top_k: int) -> Sampling:
        """The random numbers that belong to these names."""
        seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big") for name in names]
        return cls(temperature, top_k, np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds]))

    def tokens(self, logits_bv: torch.Tensor, rows: Sequence[int], step: int) -> torch.Tensor:
        """int64 [rows, 1]: the token at each row's random number of this step in the cumulative probabilities."""
        likeliest_bk, tokens_bk = logits_bv.double().topk(min(self.top_k, logits_bv.shape[1]))
        cumulated_bk = (likeliest_bk / self.temperature).softmax(1).cumsum(1)
        uniforms_b1 = torch.from_numpy(self.uniforms[list(rows), step])[:, None].to(logits_bv.device)
        at_b1 = torch.searchsorted(cumulated_bk, uniforms_b1 * cumulated_bk[:, -1:], right=True)
        return tokens_bk.gather(1, at_b1.clamp(max=tokens_bk.shape[1] - 1))


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's EOS and those of the model's generation configuration."""
    tokens = [tokenizer.eos_token_id]
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    tokens += ends if isinstance(ends, list) else [ends]
    return frozenset(int(token) for token in tokens if token is not None)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop: frozenset[int],
    batch_size: int,
) -> list[list[int]]:
    """New tokens per prompt, without the stop token; at most `max_new_tokens` (one limit for all, or one each).

    A text also ends at the model's last position (`max_position_embeddings`). Equal to `model.generate` with
    `do_sample=False` on one prompt at a time, up to ties within rounding.
    """
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    texts: list[list[int]] = [[] for _ in prompts]
    for batch in length_sorted([len(prompt) for prompt in prompts], batch_size):
        new = generate_batch(
            model, [prompts[row] for row in batch], max_new_tokens=[most[row] for row in batch], stop=stop
        )
        for row, tokens in zip(batch, new, strict=True):
            texts[row] = tokens
    return texts


@torch.no_grad()
def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    stop: frozenset[int],
    draws: Sampling | None = None,
) -> list[list[int]]:
    """`generate` for one batch of prompts; with `draws`, sampled instead of greedy.

    Prompts are padded on the left, but those of recurrent models run beside prompts of their own length only: not all
    of these leave padding out of their states. When many texts have ended, the others continue without them, with their
    part of the cache, or read again if the model has states outside the cache.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    left = [int(min(most, room - len(prompt))) for prompt, most in zip(prompts, max_new_tokens, strict=True)]
    texts: list[list[int]] = [[] for _ in prompts]
    groups: dict[int, list[int]] = {}
    for row, most in enumerate(left):
        if most > 0:
            groups.setdefault(len(prompts[row]) if is_stateful(model) else 0, []).append(row)
    for rows in groups.values():
        _extend(model, prompts, rows, left, texts, stop, draws, room)
    return texts


def _extend(
    model: Any,
    prompts: Sequence[Sequence[int]],
    live: list[int],
    left: Sequence[int],
    texts: list[list[int]],
    stop: frozenset[int],
    draws: Sampling | None,
    room: float,
) -> None:
    """Fill in `texts` of the rows `live`."""
    ids_bt, mask_bt = _left_padded([prompts[row] for row in live], model.get_input_embeddings().weight.device)
    width, cache = ids_bt.shape[1], None
    while live:
        # finished texts run on unread until many have finished, and must stay within the model's positions
        steps = min(max(left[row] - len(texts[row]) for row in live), room - int(mask_bt.sum(1).max()))
        with _default_generation(model):
            output = model.generate(
                input_ids=ids_bt,
                attention_mask=mask_bt,
                past_key_values=cache,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=steps,
                    eos_token_id=sorted(stop) or None,
                    pad_token_id=0,
                    return_dict_in_generate=True,
                ),
                logits_processor=[_TokenDraw(draws, live, width)] if draws else [],
                stopping_criteria=[_LengthLimit([left[row] for row in live], stop, width, ids_bt.device)],
            )
        for row, tokens in zip(live, output.sequences[:, width:].tolist(), strict=True):
            texts[row] = list(itertools.takewhile(lambda token: token not in stop, tokens[: left[row]]))
        new = output.sequences.shape[1] - width
        kept = [slot for slot, row in enumerate(live) if len(texts[row]) == new < left[row]]
        live = [live[slot] for slot in kept]
        if live:
            if not is_stateful(model):
                # moves the indices to each layer's device; convolutions' states follow, too
                cache = output.past_key_values
                cache.reorder_cache(torch.tensor(kept, device=ids_bt.device))
            ids_bt = output.sequences[kept]
            mask_bt = functional.pad(mask_bt[kept], (0, ids_bt.shape[1] - mask_bt.shape[1]), value=1)


def generation_columns(text: str, tokens: Sequence[int]) -> dict[str, Any]:
    """The columns that any generation has (`rows.MEASURED`)."""
    return {
        "generated": text.strip(),
        "generated_tokens": len(tokens),
        "generated_empty": not text.strip(),
        "repetition": repetition(tokens),
        "generated_entropy": ngram_entropy(tokens),
    }


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [prompts, longest]."""
    longest = max(map(len, prompts), default=0)
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, dtype=torch.long, device=device).reshape(-1, longest), torch.tensor(mask, device=device)


class _LengthLimit:
    """A stopping criterion for `model.generate`: a text stops at its limit; all stop when few are unfinished."""

    def __init__(self, left: Sequence[int], stop: frozenset[int], width: int, device: torch.device) -> None:
        self.left, self.width = torch.tensor(left, device=device), width
        self.stop = torch.tensor(sorted(stop), dtype=torch.long, device=device)

    def __call__(self, ids_bt: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        new_bt = ids_bt[:, self.width :]
        full_b = self.left <= new_bt.shape[1]
        going_b = ~(full_b | torch.isin(new_bt, self.stop).any(1))
        few = going_b.float().mean() < _COMPACT_BELOW
        return full_b | few


class _TokenDraw:
    """A logits processor for `model.generate`: only the drawn token is possible."""

    def __init__(self, draws: Sampling, rows: Sequence[int], width: int) -> None:
        self.draws, self.rows, self.width = draws, rows, width

    def __call__(self, ids_bt: torch.Tensor, scores_bv: torch.Tensor) -> torch.Tensor:
        chosen_b1 = self.draws.tokens(scores_bv, self.rows, ids_bt.shape[1] - self.width)
        return torch.full_like(scores_bv, -torch.inf).scatter(1, chosen_b1, 0.0)


@contextmanager
def _default_generation(model: Any) -> Iterator[None]:
    """Within the context, ignore the model's own generation configuration (penalties, temperatures)."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
