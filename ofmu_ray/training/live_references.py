"""What a method needs from the reference model, by the run's own workers with the model that they share, before they
change it: no process loads it whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save

from ofmu_ray.evaluation.in_step import InStep
from ofmu_ray.features.protocol import Reading, Row, Values
from ofmu_ray.features.reference import Reference
from ofmu_ray.features.refusals import write_refusals
from ofmu_ray.features.value_tables import LOGITS_AT_ONCE, Missing, MissingTensors, MissingTexts, cut
from ofmu_ray.models.answers import unwrapped
from ofmu_ray.storage import atomic_write
from ofmu_ray.training.live import agreed

if TYPE_CHECKING:
    from ofmu_ray.training.worker import Worker


def write_references(worker: Worker) -> None:
    """Compute what is missing of the worker's job, with its model as loaded. Collective.

    A start after a kill computes what was not finished. The watchdog's limit holds for a forward pass.
    """
    shared = SharedModel(worker)
    for missing in worker.job.references:
        if not agreed(worker.session.rank == 0 and missing.written):
            _write(missing, shared)
            agreed(True)  # no rank reads it before it is there
    if worker.session.device.type == "cuda":  # the peak of the rounds is their own
        torch.cuda.reset_peak_memory_stats(worker.session.device)


def _write(missing: Missing, shared: SharedModel) -> None:
    rows, first = missing.read(), shared.rank == 0
    if isinstance(missing, MissingTexts):
        texts = missing.tokens.rows(shared, rows, missing.template)
        if first:
            write_refusals(missing.path, texts)
    elif isinstance(missing, MissingTensors):
        with shared.reference(autocast=False) as reference:
            tensors = missing.feature.compute(reference, rows)
        if first:
            atomic_write(missing.path, save(tensors))
    else:
        results = shared.read(missing.feature, rows, *missing.sizes(rows), missing.title)
        if first:
            missing.write(rows, results)
        else:
            for _ in results:
                pass


class SharedModel:
    """The reference model that all ranks hold together."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.rank = worker, worker.session.rank

    @property
    def config(self) -> Any:
        """transformers' config of the text model."""
        return unwrapped(self.worker.module).config.get_text_config()

    @contextmanager
    def reference(self, *, autocast: bool) -> Iterator[Reference]:
        """The model for passes without gradients. Each is collective."""
        worker = self.worker
        autocast = autocast and worker.job.model.precision == "bf16_autocast"
        with worker.engine.reading(autocast=autocast) as module:
            hook = unwrapped(module).register_forward_pre_hook(lambda *_: worker.watchdog.begin("reference values"))
            try:
                yield Reference(module, worker.processor, worker.task, worker.session.device, autocast=autocast)
            finally:
                hook.remove()
                worker.watchdog.end()

    def read(
        self, reading: Reading, rows: Sequence[Row], lengths: np.ndarray, wide: np.ndarray, title: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(row number, the model's result for it), on every rank: each runs its share of the batches. Collective."""
        batches = cut(lengths, wide, LOGITS_AT_ONCE[self.worker.session.device.type])
        together = _pass_by_pass if isinstance(reading, Values) else _at_own_pace
        with self.reference(autocast=True) as reference:
            yield from together(reference, reading, rows, batches)


def _pass_by_pass(
    reference: Reference, reading: Reading, rows: Sequence[Row], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[int, np.ndarray]]:
    """For what runs the model equally often for every batch, perhaps not all of it. Collective."""
    many = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
    for first in range(0, len(batches), world):
        # every pass is one of all ranks: a rank for which no batch is left runs the last one, too
        own = batches[min(first + rank, len(batches) - 1)]
        values = reference.of(reading, [rows[number] for number in own])
        for source, numbers in enumerate(batches[first : first + world]):
            box: list[Any] = [values if source == rank else None]
            if many:  # one rank's values at a time: gathered, those of many ranks could exceed a device's memory
                dist.broadcast_object_list(box, src=source)
            yield from zip(numbers, box[0], strict=True)


def _at_own_pace(
    reference: Reference, reading: Reading, rows: Sequence[Row], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[int, np.ndarray]]:
    """For generation, whose number of passes depends on the texts. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with InStep(unwrapped(reference.module)):
        own = [
            (numbers, reference.of(reading, [rows[number] for number in numbers])) for numbers in batches[rank::world]
        ]
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, own)
    for numbers, results in (batch for share in shares for batch in share):
        yield from zip(numbers, results, strict=True)
