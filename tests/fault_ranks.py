"""A run with several ranks, without Ray, that tests/test_faults.py kills, damages and resumes with other workers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_ranks import all_ranks
from fault_job import make_job

from ofmu_ray.config import OptimizerConfig, TrainingConfig
from ofmu_ray.data.batch_plan import read_plan
from ofmu_ray.data.batches import local_rounds
from ofmu_ray.methods.ofmu import OFMUConfig
from ofmu_ray.training.worker import Worker

AFTER = 5
"""Rounds before the interruption; the last checkpoint is from round 4."""
MOMENTS = OptimizerConfig(name="adamw", lr=2e-3, clip=1.0, eps=1e-3), OptimizerConfig(name="sgd", lr=0.05, momentum=0.5)
METHOD = OFMUConfig.from_preset("lite", inner_steps=2, relative_step=1e-3, rho=1e-7, inner=MOMENTS[0], outer=MOMENTS[1])


@dataclass(frozen=True)
class Part:
    """One start of a run."""

    stage: int
    folder: str
    interrupt: bool = False
    damage: bool = False
    """Before the start, flip a bit in the newest checkpoint's last shard."""

    def __str__(self) -> str:
        return f"{self.folder}-{'begun' if self.interrupt else 'whole'}"


class FolderSession:
    """Ranks that share a folder of checkpoints, as Ray Train's workers do."""

    def __init__(self, run_dir: str, rank: int, world: int):
        self.folder, self.rank, self.world = Path(run_dir) / "train", rank, world
        self.device = torch.device("cpu")

    def report(self, folder: Path, name: str, done: int) -> None:
        shutil.copytree(folder, self.folder / name, dirs_exist_ok=True)
        shutil.rmtree(folder)
        dist.barrier()

    def checkpoints(self) -> Sequence[tuple[str, AbstractContextManager[Path]]]:
        dist.barrier()
        return [(path.name, nullcontext(path)) for path in sorted(self.folder.glob("round_*"), reverse=True)]


def start(part: Part, rank: int, world: int) -> dict[str, Any]:
    """Start or resume a run; returns what rank 0 knows at its end."""
    training = TrainingConfig(
        engine="deepspeed",
        workers=world,
        zero_stage=part.stage,
        rounds=8,
        batch_size=4,
        checkpoint_every=2,  # type: ignore[arg-type]
    )
    folder = Path(part.folder)
    if rank == 0:
        make_job(folder, training=training, method=METHOD, name="run")
        if part.damage:
            newest = sorted((folder / "run/train").glob("round_*"))[-1]
            shard = sorted(newest.glob("rank_*.pt"))[-1]
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
    dist.barrier()
    job = make_job(folder, training=training, method=METHOD, name="run")
    worker = Worker(job, FolderSession(job.run_dir, rank, world))
    first = worker.state.round
    plan = read_plan(job.plan_dir)

    def source(at: int, options: dict[str, Any]) -> Iterator[Any]:
        for number, batches in enumerate(local_rounds(plan, rank, start_round=at, **options)):
            if part.interrupt and number == AFTER:
                raise KeyboardInterrupt
            yield batches

    try:
        worker.run(source)
    except KeyboardInterrupt:
        assert part.interrupt
    state, counts = worker.state, worker.engine.account.state()
    newest = sorted((folder / "run/train").glob("round_*"))[-1]
    same = [None] * world
    dist.all_gather_object(same, (first, state.notes))
    result = {
        "first": first,
        "bytes": [shard.stat().st_size for shard in sorted(newest.glob("rank_*.pt"))],
        "notes": state.notes,
        "agreed": all_ranks(all(one == same[0] for one in same)),
        "weights": worker.engine.full_weights(),
        "series": state.series,
        "account": counts,
    }
    worker.engine.close()  # type: ignore[attr-defined]
    return result
