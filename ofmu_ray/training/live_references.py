"""Values of rows under the reference model by a run's own workers, with the model that they share and before they
change it: no process loads it whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ofmu_ray.data.sidecar import has_table
from ofmu_ray.features.protocol import Row, Values
from ofmu_ray.features.reference import Reference
from ofmu_ray.features.value_tables import LOGITS_AT_ONCE, cut
from ofmu_ray.models.answers import unwrapped
from ofmu_ray.training.live import agreed

if TYPE_CHECKING:
    from ofmu_ray.training.worker import Worker


def write_tables(worker: Worker) -> None:
    """Compute the tables of the worker's job that are missing, with its model as loaded. Collective.

    A start after a kill computes those that were not finished. The watchdog's limit holds for a forward pass.
    """
    session, model = worker.session, worker.job.model
    for table in worker.job.references:
        if agreed(session.rank == 0 and has_table(table.folder)):
            continue
        rows = table.read()
        batches = cut(*table.sizes(rows), LOGITS_AT_ONCE[session.device.type])
        with worker.engine.reading(autocast=True) as module:
            hook = unwrapped(module).register_forward_pre_hook(lambda *_: worker.watchdog.begin("reference values"))
            autocast = model.precision == "bf16_autocast"
            reference = Reference(module, worker.processor, worker.task, session.device, autocast=autocast)
            results = _together(reference, table.feature, rows, batches)
            try:
                if session.rank == 0:
                    table.write(rows, results)
                else:
                    for _ in results:
                        pass
            finally:
                hook.remove()
                worker.watchdog.end()
    agreed(True)  # no rank looks for a table before it is there
    if session.device.type == "cuda":  # the peak of the rounds is their own
        torch.cuda.reset_peak_memory_stats(session.device)


def _together(
    reference: Reference, feature: Values, rows: Sequence[Row], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[int, np.ndarray]]:
    """(row number, its values) for every row, on every rank: each runs its share of the batches. Collective."""
    many = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
    for first in range(0, len(batches), world):
        # every pass is one of all ranks: a rank for which no batch is left runs the last one, too
        own = batches[min(first + rank, len(batches) - 1)]
        values = reference.of(feature, [rows[number] for number in own])
        for source, numbers in enumerate(batches[first : first + world]):
            box: list[Any] = [values if source == rank else None]
            if many:  # one rank's values at a time: gathered, those of many ranks could exceed a device's memory
                dist.broadcast_object_list(box, src=source)
            yield from zip(numbers, box[0], strict=True)
