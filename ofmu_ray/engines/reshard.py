"""Reshard a saved state for another number of workers.

The flat vectors of a sharded engine are sequences of pieces: one piece per group of parameters (ZeRO stages 1 and 2) or
per parameter (stage 3). A piece of n elements is split over w ranks into w equal shares, the last padded with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ofmu_ray.engines.protocol import Vector
from ofmu_ray.errors import UserError

State = Mapping[str, Any]


def reshard(states: Sequence[State], layout: Mapping[str, Any]) -> dict[str, Any]:
    """The saved `state_dict`s of all ranks -> the state of the rank with this `layout` (Shards.layout).

    Masters and moments are preserved bit for bit. Only the parts that this rank needs are read.

    Raises:
        UserError: another ZeRO stage or model.
    """
    first = states[0]
    saved = first["layout"]
    if "pieces" not in layout or [n for n, _ in saved.get("pieces", ())] != [n for n, _ in layout["pieces"]]:
        if saved == layout:  # every rank has everything
            return dict(first)
        raise UserError(
            f"the checkpoint was written by {saved['workers']} workers with {saved['layout']}, this run is "
            f"{layout['layout']}: resume with the same training.engine, training.zero_stage and model"
        )
    masters = _cut([state["masters"] for state in states], saved["pieces"], layout)
    loops = {loop: _optimizer(states, loop, layout) for loop in first["optimizers"]}
    names = first.get("kept", {})
    kept = {name: _cut([state["kept"][name] for state in states], saved["pieces"], layout) for name in names}
    return {**first, "layout": dict(layout), "masters": masters, "optimizers": loops, "kept": kept}


def _optimizer(states: Sequence[State], loop: str, layout: Mapping[str, Any]) -> dict[str, Any]:
    """State of a torch optimiser whose parameters are the masters; all ranks use the same rule."""
    saved = [state["optimizers"][loop] for state in states]
    shapes = [master.shape for master in states[0]["masters"]]
    count = len(layout["shards"])
    moments: dict[int, dict[str, Any]] = {index: {} for index in range(count)} if saved[0]["state"] else {}
    for name, value in saved[0]["state"].get(0, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == shapes[0]:
            vectors = [[one["state"][index][name] for index in range(len(shapes))] for one in saved]
            parts: Sequence[Any] = _cut(vectors, states[0]["layout"]["pieces"], layout)
        else:  # the number of steps
            parts = [value] * count
        for index in range(count):
            moments[index][name] = parts[index]
    (group,) = saved[0]["param_groups"]
    return {"state": moments, "param_groups": [{**group, "params": list(range(count))}]}


def _cut(vectors: Sequence[Vector], pieces: Sequence[tuple[int, int]], layout: Mapping[str, Any]) -> Vector:
    """This rank's share of a vector, given the saved shares of all ranks."""
    own = torch.zeros(sum(layout["shards"]), dtype=vectors[0][0].dtype)
    source = target = 0
    for (numel, before), (_, after) in zip(pieces, layout["pieces"], strict=True):
        start, end = layout["rank"] * after, min((layout["rank"] + 1) * after, numel)
        while start < end:  # one old share after the other
            rank, offset = divmod(start, before)
            size = min(before - offset, end - start)
            at = target + start - layout["rank"] * after
            _copy(own[at : at + size], vectors[rank], source + offset)
            start += size
        source, target = source + before, target + after
    return list(torch.split(own, layout["shards"]))


def _copy(target: torch.Tensor, vector: Vector, start: int) -> None:
    """Copy the vector's elements from `start` on, across its tensors."""
    done = 0
    for shard in vector:
        if start < shard.numel() and done < target.numel():
            part = shard[start : start + target.numel() - done]
            target[done : done + part.numel()] = part
            done += part.numel()
        start = max(0, start - shard.numel())
    assert done == target.numel(), f"{target.numel() - done} elements beyond the end of the saved vector"
