"""Greedy generations that were begun elsewhere, continued together: one that ends makes room for the next.

Every generation has a slot. Its keys and values stand there from column 0 on: texts of any length share a step without
being aligned, and a new one moves nothing but its own states. For models that take trees (`tree.takes_trees`), because
a step attends by the same interface.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from ofmu_ray.evaluation.tree import attending

_ATTENTION = "ofmu_slots"
_REFILL_BELOW = 0.95  # share of slots in use below which others move up and waiting generations are asked for
_TOGETHER = 32  # slots of one attention call: each call reads keys up to the longest of its texts
_LEAST_ROOM = 64  # columns

States = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Per layer, one text's keys and values [heads, length, width]."""


class Begun(NamedTuple):
    """A generation whose first tokens are known."""

    tokens: list[int]
    """New tokens so far."""
    states: States | None
    """Of the prompt and all of `tokens` but the last; None: ended."""


@torch.inference_mode()
def finish(
    model: Any, begun: Iterable[Begun], left: Sequence[int], *, stop: frozenset[int], slots: int
) -> Iterator[tuple[int, list[int]]]:
    """(number, all new tokens) of every generation, as they end; `slots` of them go on at a time.

    `left`: most new tokens of each, `tokens` included. `begun` is read as slots become free, so that the batch stays
    full until the last generations: a step on few rows costs hardly less than one on many.
    """
    batch = _Batch(model, slots, stop)
    waiting = enumerate(begun)
    more = True
    while more or batch.going:
        batch.settle()
        while more and len(batch.going) < slots:
            number, start = next(waiting, (-1, None))
            if start is None:
                more = False
            elif start.states is None:
                yield number, start.tokens
            else:
                batch.join(_Text(number, list(start.tokens), left[number], start.states[0][0].shape[1]), start.states)
        for text in batch.run(_REFILL_BELOW * (slots if more else len(batch.going))):
            yield text.number, text.tokens


@dataclass
class _Text:
    """A generation that goes on."""

    number: int
    tokens: list[int]
    most: int
    known: int
    """Tokens of the text, the prompt's included, whose states stand in its slot."""


class _Batch:
    """Generations in their slots."""

    def __init__(self, model: Any, slots: int, stop: frozenset[int]) -> None:
        self.model = model
        self.stop = stop
        self.device = model.get_input_embeddings().weight.device
        self.slots = slots
        self.going: dict[int, _Text] = {}
        """Slot -> generation. Slots are taken from 0 on."""
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [_SlotLayer() for _ in self.cache.layers]

    def join(self, text: _Text, states: States) -> None:
        slot = len(self.going)
        self.going[slot] = text
        for layer, (keys, values) in zip(self.cache.layers, states, strict=True):
            layer.put(slot, keys, values, self.slots)

    def settle(self) -> None:
        """Let those that go on take the first slots, the longest first, as far as it matters to attention."""
        order = sorted(self.going.items(), key=lambda item: -item[1].known)
        settled: dict[int, _Text] = {}
        moves: list[tuple[int, int]] = []
        for start in range(0, len(order), _TOGETHER):
            together = order[start : start + _TOGETHER]
            places = range(start, start + len(together))
            staying = {slot for slot, _ in together if slot in places}
            free = (slot for slot in places if slot not in staying)
            for slot, text in together:
                place = slot if slot in staying else next(free)
                settled[place] = text
                if place != slot:
                    moves.append((slot, place))
        self.going = settled
        if moves:
            old, new = torch.tensor(moves, device=self.device).T
            longest = max(settled[place].known for _, place in moves)
            for layer in self.cache.layers:
                layer.move(old, new, longest)

    def run(self, least: float) -> list[_Text]:
        """Steps until fewer than `least` generations go on; those that ended."""
        ended: list[_Text] = []
        if not self.going:
            return ended
        self.used = len(self.going)
        with attending(self.model, _ATTENTION):
            while self.going and (not ended or len(self.going) >= least):
                ended += self._step()
        return ended

    def _step(self) -> list[_Text]:
        inputs, columns = [0] * self.used, [0] * self.used  # of a slot whose text has ended: nobody reads its results
        for slot, text in self.going.items():
            inputs[slot], columns[slot] = text.tokens[-1], text.known
        step = _Step(columns, self.device)
        token = _now.set(step)
        try:
            logits = self.model(
                input_ids=torch.tensor([inputs], device=self.device),
                position_ids=step.columns[None],
                past_key_values=self.cache,
                use_cache=True,
            ).logits
        finally:
            _now.reset(token)
        best = logits[0].argmax(dim=-1).tolist()
        ended = []
        for slot, text in list(self.going.items()):
            text.known += 1
            if best[slot] not in self.stop:
                text.tokens.append(best[slot])
                if len(text.tokens) < text.most:
                    continue
            ended.append(self.going.pop(slot))
        return ended


class _Step:
    """Where the states of this step's tokens go, and what the tokens see; the same in all layers."""

    def __init__(self, columns: Sequence[int], device: torch.device) -> None:
        self.columns = torch.tensor(columns, device=device)
        """Column of each slot's new token, [slots]; it sees the columns up to this one."""
        self.length = max(columns) + 1
        self.slots = torch.arange(len(columns), device=device)
        self.calls: list[tuple[slice, int, torch.Tensor]] = []
        """Slots that attend together, how many columns they look at, and which [slots, 1, 1, columns]."""
        for start in range(0, len(columns), _TOGETHER):
            together = slice(start, start + _TOGETHER)
            length = max(columns[together]) + 1
            sees = torch.arange(length, device=device) <= self.columns[together, None]
            self.calls.append((together, length, sees[:, None, None]))


_now: ContextVar[_Step] = ContextVar("now")


class _SlotLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [slots, heads, columns, width]. Unused columns hold finite numbers."""

    def put(self, slot: int, keys: torch.Tensor, values: torch.Tensor, slots: int) -> None:
        """States [heads, length, width] of a text that takes this slot."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = (each.new_zeros(slots, each.shape[0], 0, each.shape[2]) for each in (keys, values))
        length = keys.shape[1]
        self._make_room(length)
        self.keys[slot, :, :length] = keys
        self.values[slot, :, :length] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States of the step's tokens, [1, heads, slots, width] -> of all texts, [slots, heads, length, width]."""
        step = _now.get()
        self._make_room(step.length)
        self.keys[step.slots, :, step.columns] = key_states[0].transpose(0, 1)
        self.values[step.slots, :, step.columns] = value_states[0].transpose(0, 1)
        used = len(step.slots)
        return self.keys[:used, :, : step.length], self.values[:used, :, : step.length]

    def move(self, old: torch.Tensor, new: torch.Tensor, length: int) -> None:
        """States of the slots `old` to the slots `new`."""
        for states in (self.keys, self.values):
            states[new, :, :length] = states[old, :, :length]

    def _make_room(self, length: int) -> None:
        if length > self.keys.shape[2]:
            self.keys, self.values = (_wider(each, max(_LEAST_ROOM, 2 * length)) for each in (self.keys, self.values))


def _wider(states: torch.Tensor, columns: int) -> torch.Tensor:
    slots, heads, used, width = states.shape
    wider = states.new_zeros(slots, heads, columns, width)
    wider[:, :, :used] = states
    return wider


def _slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Queries [1, heads, slots, width] of a step, keys and values of a `_SlotLayer` -> [1, slots, heads, width]."""
    slots, key_heads = key.shape[:2]
    # query heads that share a key head are the rows of one product: no copies of the keys
    grouped = query[0].transpose(0, 1).reshape(slots, key_heads, -1, query.shape[-1])
    parts = [
        functional.scaled_dot_product_attention(
            grouped[some], key[some, :, :length], value[some, :, :length], attn_mask=sees, scale=scaling
        )
        for some, length, sees in _now.get().calls
    ]
    return torch.cat(parts).reshape(1, slots, -1, value.shape[-1]), None


AttentionInterface.register(_ATTENTION, _slot_attention)
