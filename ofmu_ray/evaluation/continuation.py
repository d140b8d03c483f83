"""Greedy generations that were begun elsewhere, continued together: one that ends makes room for the next.

Every generation has a slot. Its keys and values stand there from column 0 on: texts of any length share a step without
being aligned, and a new one moves nothing but its own states. For models that take trees (`tree.takes_trees`), because
a step attends by the same interface.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from ofmu_ray.evaluation.scoring import most_likely
from ofmu_ray.models.forward import Forward

_REFILL_BELOW = 0.95  # share of slots in use below which others move up and waiting generations are asked for
_TOGETHER = 32  # slots of one attention call: each call reads keys up to the longest of its texts
_LEAST_ROOM = 64  # columns

States = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Per layer, the keys and values of a pass, [tokens, key heads, width]."""


class Begun(NamedTuple):
    """A generation whose first tokens are known."""

    tokens: list[int]
    """New tokens so far."""
    states: States | None
    """Of the pass that the prompt and all of `tokens` but the last went through; None: ended."""
    places: Sequence[int] = ()
    """Where in the pass they stand."""


@torch.inference_mode()
def finish(
    forward: Forward, begun: Iterable[Begun], left: Sequence[int], *, stop: frozenset[int], slots: int
) -> Iterator[tuple[int, list[int]]]:
    """(number, all new tokens) of every generation, as they end; `slots` of them go on at a time.

    `left`: most new tokens of each, `tokens` included. `begun` is read as slots become free, so that the batch stays
    full until the last generations: a step on few rows costs hardly less than one on many.
    """
    slots = min(slots, len(left))
    batch = _Batch(forward, slots, stop)
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
                batch.join(_Text(number, list(start.tokens), left[number], len(start.places)), start)
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

    def __init__(self, forward: Forward, slots: int, stop: frozenset[int]) -> None:
        self.forward = forward
        self.stop = stop
        self.device = forward.model.get_input_embeddings().weight.device
        self.slots = slots
        self.going: dict[int, _Text] = {}
        """Slot -> generation. Slots are taken from 0 on."""
        self.layers: list[_Layer] = []

    def join(self, text: _Text, begun: Begun) -> None:
        slot = len(self.going)
        self.going[slot] = text
        states = begun.states or ()
        self.layers = self.layers or [_Layer(keys, values, self.slots) for keys, values in states]
        places = torch.tensor(begun.places, device=self.device)
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer.put(slot, keys.index_select(0, places), values.index_select(0, places))

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
            for layer in self.layers:
                layer.move(old, new, longest)

    def run(self, least: float) -> list[_Text]:
        """Steps until fewer than `least` generations go on; those that ended."""
        ended: list[_Text] = []
        if not self.going:
            return ended
        self.used = len(self.going)
        while self.going and (not ended or len(self.going) >= least):
            ended += self._step()
        return ended

    def _step(self) -> list[_Text]:
        inputs, columns = [0] * self.used, [0] * self.used  # of a slot whose text has ended: nobody reads its results
        for slot, text in self.going.items():
            inputs[slot], columns[slot] = text.tokens[-1], text.known
        step = _Step(columns, self.layers, self.device)
        best = most_likely(self.forward(torch.tensor(inputs, device=self.device), step.columns, step)).tolist()
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
    """Attention of one step: where the states of its tokens go, and what the tokens see; the same in all layers."""

    def __init__(self, columns: Sequence[int], layers: Sequence[_Layer], device: torch.device) -> None:
        self.layers = layers
        self.columns = torch.tensor(columns, device=device)
        """Column of each slot's new token, [slots]; it sees the columns up to this one."""
        self.length = max(columns) + 1
        self.slots = torch.arange(len(columns), device=device)
        self.calls: list[tuple[slice, int, torch.Tensor]] = []
        """Slots that attend together, how many columns they look at, and which [slots, 1, 1, columns]."""
        for start in range(0, len(columns), _TOGETHER):
            together = slice(start, min(start + _TOGETHER, len(columns)))
            length = max(columns[together]) + 1
            sees = torch.arange(length, device=device) <= self.columns[together, None]
            self.calls.append((together, length, sees[:, None, None]))

    def __call__(
        self, layer: int, query_nhd: torch.Tensor, key_nkd: torch.Tensor, value_nkd: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """See `forward.Attend`; token n is that of slot n."""
        states = self.layers[layer]
        states.make_room(self.length)
        states.keys[self.slots, :, self.columns] = key_nkd
        states.values[self.slots, :, self.columns] = value_nkd
        # query heads that share a key head are the rows of one product: no copies of the keys
        slots, key_heads = key_nkd.shape[:2]
        grouped = query_nhd.reshape(slots, key_heads, -1, query_nhd.shape[-1])
        parts = [
            functional.scaled_dot_product_attention(
                grouped[some],
                states.keys[some, :, :length],
                states.values[some, :, :length],
                attn_mask=sees,
                scale=scale,
            )
            for some, length, sees in self.calls
        ]
        return torch.cat(parts).reshape(slots, -1, value_nkd.shape[-1])


class _Layer:
    """Keys and values of one layer, [slots, heads, columns, width]. Unused columns hold finite numbers."""

    def __init__(self, keys_nkd: torch.Tensor, values_nkd: torch.Tensor, slots: int) -> None:
        """Room for states like these."""
        self.keys, self.values = (
            each.new_zeros(slots, each.shape[1], 0, each.shape[2]) for each in (keys_nkd, values_nkd)
        )

    def put(self, slot: int, keys_tkd: torch.Tensor, values_tkd: torch.Tensor) -> None:
        """States [length, heads, width] of a text that takes this slot."""
        length = keys_tkd.shape[0]
        self.make_room(length)
        self.keys[slot, :, :length] = keys_tkd.transpose(0, 1)
        self.values[slot, :, :length] = values_tkd.transpose(0, 1)

    def move(self, old: torch.Tensor, new: torch.Tensor, length: int) -> None:
        """States of the slots `old` to the slots `new`."""
        for states in (self.keys, self.values):
            states[new, :, :length] = states[old, :, :length]

    def make_room(self, length: int) -> None:
        if length > self.keys.shape[2]:
            self.keys, self.values = (_wider(each, max(_LEAST_ROOM, 2 * length)) for each in (self.keys, self.values))


def _wider(states: torch.Tensor, columns: int) -> torch.Tensor:
    slots, heads, used, width = states.shape
    wider = states.new_empty(slots, heads, columns, width)
    wider[:, :, :used] = states
    wider[:, :, used:] = 0
    return wider
