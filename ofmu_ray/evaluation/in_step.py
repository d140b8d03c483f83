"""Evaluation by all ranks of a process group that hold one model together (ZeRO-3).

A forward pass of such a model gathers weights from every rank, so every rank must run the same number of passes. How
many its rows take depends on how long its generations get. So each pass begins with an all-reduce that says "another
pass", and a rank that has finished its rows joins the others' passes with one token until nobody needs one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist

from ofmu_ray import progress
from ofmu_ray.evaluation.scorer import Scorer
from ofmu_ray.evaluation.units import Result, Unit


class InStep:
    """Within the context, each forward pass of `model` is one of all ranks. Leaving it waits for the other ranks.

    Every rank enters and leaves; in between, each may run any number of passes of any shape.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.passes = 0
        """Of this rank, without those that it only joined."""
        self._working = True

    def __enter__(self) -> Self:
        # before ZeRO-3's own hook of the model, which starts to gather
        self._hook = self.model.register_forward_pre_hook(self._announce, prepend=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._join()
        finally:
            self._hook.remove()

    def _announce(self, *_: Any) -> None:
        if self._working:
            self.passes += 1
            self._working_ranks(1.0)  # nobody reads the sum here, so the host does not wait for the device

    def _join(self) -> None:
        self._working = False
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            while self._working_ranks(0.0).item():
                self.model(input_ids=token, use_cache=False)

    def _working_ranks(self, own: float) -> torch.Tensor:
        total = torch.full((), own, device=self.device)
        dist.all_reduce(total)
        return total


def run_together(scorer: Scorer, units: Sequence[Unit]) -> Iterator[tuple[int, Result]]:
    """(index of the unit, its values) for every unit, on every rank: each rank runs its share. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with InStep(scorer.model):
        chosen, own = range(rank, len(units), world), []
        with progress.bar("evaluate, on every worker", len(chosen), "batch") as bar:
            for number in chosen:
                own.append((number, scorer.run(units[number])))
                bar.update()
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, own)
    yield from sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
