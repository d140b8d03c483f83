"""Evaluations during a run, after each of which someone else decides whether it goes on (schedulers of a sweep).

Worker and decider share a folder: rank 0 writes `<stage>.json` (figures and cost), the decider answers with
`<stage>.go` or `<stage>.stop`. Files, because they outlive either process: a resumed run knows what it measured and
what was decided, and the two may be in different processes on different nodes of one shared storage.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ofmu_ray.engines.protocol import Engine
from ofmu_ray.storage import atomic_write
from ofmu_ray.tasks.protocol import Evaluation, Task

POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Stages:
    """When a run is evaluated on its way, and on what."""

    folder: str
    """Of the decisions; on storage that worker and decider see."""
    count: int
    """Evaluations of a whole run; the last one, at its end, is not taken here."""
    evaluation: Evaluation
    """Of the rows that the run is judged on."""
    retrained: Any = None
    """Per-row values of the retrained model (pyarrow Table), or None."""

    def reached(self, before: float, after: float) -> int | None:
        """The stage that a round passes which takes the run's progress (0 to 1) from `before` to `after`; None: none.

        Of several stages in one round, the last; never the one at the end.
        """
        stage = min(int(after * self.count + 1e-9), self.count - 1)
        return stage if stage > int(before * self.count + 1e-9) else None

    def measure(
        self, task: Task, engine: Engine, module: torch.nn.Module, processor: Any, rank: int
    ) -> dict[str, Any] | None:
        """Metrics of the model as it is now, on rank 0; None elsewhere. Collective. The model is left as it was.

        They are computed from a copy of the weights, in fp32 on a CPU and as stored on CUDA, as those of the exported
        model are.
        """
        weights = engine.full_weights()
        if weights is None or rank != 0:
            return None
        table = self.evaluation.live_table(task.copy(module, weights), processor, "stage")
        return self.evaluation.figures(table, self.retrained)

    def known(self, stage: int) -> dict[str, Any] | None:
        """What a stage's evaluation found, if it took place."""
        return read_stage(self.folder, stage)

    def publish(self, stage: int, content: Mapping[str, Any]) -> None:
        """Write a stage down; its decision may follow."""
        atomic_write(_path(self.folder, stage, "json"), json.dumps(content) + "\n")

    def wait(self, stage: int, rank: int) -> bool:
        """Whether the run goes on, once that is decided. Collective."""
        go = False
        if rank == 0:
            decided = None
            while decided is None:
                decided = decision(self.folder, stage)
                if decided is None:
                    time.sleep(POLL_SECONDS)
            go = decided
        if not dist.is_initialized():
            return go
        answer = torch.tensor(float(go), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(answer, src=0)
        return bool(answer)


def read_stage(folder: str | Path, stage: int) -> dict[str, Any] | None:
    """What was published of a stage, or None."""
    path = _path(folder, stage, "json")
    return json.loads(path.read_text()) if path.exists() else None


def decide(folder: str | Path, stage: int, *, go: bool) -> None:
    """The decider's answer to a stage."""
    atomic_write(_path(folder, stage, "go" if go else "stop"), "")


def decision(folder: str | Path, stage: int) -> bool | None:
    """What was decided after a stage; None: nothing yet."""
    for word, go in (("stop", False), ("go", True)):
        if _path(folder, stage, word).exists():
            return go
    return None


def _path(folder: str | Path, stage: int, suffix: str) -> Path:
    return Path(folder) / f"{stage:04d}.{suffix}"
