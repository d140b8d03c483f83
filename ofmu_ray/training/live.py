"""Evaluation of a run's models by its own workers, with the model that they train: no second copy is loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from ofmu_ray.cluster.watchdog import Watchdog
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.models.answers import unwrapped
from ofmu_ray.storage import atomic_write, is_file, join, locate
from ofmu_ray.tasks.protocol import Evaluation

if TYPE_CHECKING:
    from ofmu_ray.training.worker import Worker

_SECONDS = b"ofmu.seconds"


@dataclass(frozen=True, kw_only=True)
class LiveEvaluation:
    """What the workers evaluate besides their rounds. Tables lie in `folder` until the run is written."""

    folder: str
    evaluation: Evaluation
    before: bool
    """Whether the model before the first round is evaluated, too."""

    def begin(self, worker: Worker) -> None:
        """Evaluate the model before the first round, unless that is done. Collective."""
        missing = self.before and worker.state.round == 0 and not is_file(self._path("before"))
        if agreed(missing):
            self._keep(worker, "before")

    def end(self, worker: Worker) -> None:
        """Evaluate the exported model: the weights in memory take its values. The run is over. Collective.

        A run that its scheduler has stopped is not evaluated.
        """
        if worker.state.status == "stopped":
            return
        worker.task.round_as_exported(  # type: ignore[attr-defined]
            worker.module, worker.job.model, worker.job.export
        )
        self._keep(worker, "after")

    def table(self, label: str) -> tuple[Any, float]:
        """The rows of the model `before` or `after` (pyarrow Table; None: not evaluated), and the seconds it took."""
        if not is_file(self._path(label)):
            return None, 0.0
        filesystem, inside = locate(self._path(label))
        table = pq.read_table(inside, filesystem=filesystem, partitioning=None)
        return table.replace_schema_metadata(None), float(table.schema.metadata[_SECONDS])

    def _keep(self, worker: Worker, label: str) -> None:
        started = time.perf_counter()
        table = shared_rows(self.evaluation, worker.engine, worker.processor, worker.watchdog, label)
        if worker.session.rank == 0:
            seconds = str(time.perf_counter() - started).encode()
            content = pa.BufferOutputStream()
            pq.write_table(table.replace_schema_metadata({_SECONDS: seconds}), content)
            atomic_write(self._path(label), content.getvalue().to_pybytes())
        if worker.session.device.type == "cuda":  # the peak of the rounds is their own
            torch.cuda.reset_peak_memory_stats(worker.session.device)

    def _path(self, label: str) -> str:
        return join(self.folder, f"{label}.parquet")


def shared_rows(evaluation: Any, engine: Engine, processor: Any, watchdog: Watchdog, label: str) -> pa.Table:
    """The rows of the engine's model, evaluated by all its ranks; on each. Collective.

    The watchdog's limit holds for a forward pass: a whole evaluation may take longer than a round.
    """
    with engine.reading() as module:
        hook = unwrapped(module).register_forward_pre_hook(lambda *_: watchdog.begin("an evaluation"))
        try:
            return evaluation.shared_table(module, processor, label)
        finally:
            hook.remove()
            watchdog.end()


def agreed(value: bool) -> bool:
    """Rank 0's value, on all ranks: their views of a shared folder may differ for a while. Collective."""
    if not dist.is_initialized():
        return value
    answer = torch.tensor(float(value), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(answer, src=0)
    return bool(answer)
