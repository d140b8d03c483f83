"""Evaluations during a run, after each of which a sweep's scheduler decides if it continues (`stage_files`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ofmu_ray.cluster.watchdog import Watchdog
from ofmu_ray.engines.protocol import Engine
from ofmu_ray.tasks.protocol import Evaluation, Task
from ofmu_ray.training.live import agreed, shared_rows
from ofmu_ray.training.stage_files import decision, publish, read_stage

POLL_SECONDS = 0.05
ANSWER_SECONDS = 30.0
"""After which rank 0 tells the others that there is no decision yet."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """When a run is evaluated on the way, and on what."""

    folder: str
    """Folder of the decisions, on storage shared by worker and scheduler."""
    count: int
    """Evaluations of a complete run; the last one, at its end, is done elsewhere."""
    evaluation: Evaluation
    """Evaluation on the rows that decide."""
    retrained: Any = None
    """Per-row values of the retrained model (pyarrow Table), or None."""
    live: bool = False
    """All ranks evaluate the model that they hold; otherwise rank 0 evaluates a copy, and the others wait."""

    def reached(self, before: float, after: float) -> int | None:
        """The stage passed when the run's progress (0 to 1) goes from `before` to `after`; None: none.

        If a round passes several, the last of them; never the one at the end.
        """
        stage = min(int(after * self.count + 1e-9), self.count - 1)
        return stage if stage > int(before * self.count + 1e-9) else None

    def measure(
        self,
        task: Task,
        engine: Engine,
        module: torch.nn.Module,
        processor: Any,
        rank: int,
        watchdog: Watchdog,
    ) -> dict[str, Any] | None:
        """Metrics of the current model on rank 0; None elsewhere. Collective. Does not change the model.

        Unless `live`, computed from a copy of the weights, in fp32 on a CPU and as stored on CUDA, like those of the
        exported model.
        """
        if self.live:
            table = shared_rows(self.evaluation, engine, processor, watchdog, "stage")
        else:
            weights, waiting = engine.full_weights(), None
            if weights is not None and rank == 0:
                waiting = _ThreadCall(
                    partial(self.evaluation.live_table, task.copy(module, weights), processor, "stage")
                )
            # now and then, so that no rank waits in one collective for its whole limit
            while not agreed(waiting is not None and waiting.over()):
                pass
            table = None if waiting is None else waiting.result()
        return self.evaluation.metrics(table, self.retrained) if rank == 0 else None

    def known(self, stage: int) -> dict[str, Any] | None:
        """The published result of a stage, if any."""
        return read_stage(self.folder, stage)

    def publish(self, stage: int, content: Mapping[str, Any]) -> None:
        """Publish the result of a stage, for the decision."""
        publish(self.folder, stage, content)

    def wait(self, stage: int, rank: int) -> bool:
        """Wait for the decision whether the run continues, however long it takes. Collective."""
        while True:
            decided = self._decision(stage) if rank == 0 else None
            if agreed(decided is not None):  # now and then, so that no rank waits in one collective for its whole limit
                return agreed(bool(decided))

    def _decision(self, stage: int) -> bool | None:
        end = time.monotonic() + ANSWER_SECONDS
        while (decided := decision(self.folder, stage)) is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return decided


class _ThreadCall:
    """The result of a call in another thread, on this one's GPU."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._future: Future[Any] = Future()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            try:
                with nullcontext() if device is None else torch.cuda.device(device):
                    self._future.set_result(call())
            except BaseException as error:  # raised where the result is asked for
                self._future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    def over(self) -> bool:
        """Wait for up to ANSWER_SECONDS; whether the call has ended."""
        return bool(wait([self._future], ANSWER_SECONDS).done)

    def result(self) -> Any:
        return self._future.result()
