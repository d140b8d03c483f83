"""Where a worker's loop runs: in Ray Train, or alone in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from ofmu_ray import progress
from ofmu_ray.storage import atomic_dir, explained, join
from ofmu_ray.training.checkpoint_list import local_checkpoints


class Session(Protocol):
    """Rank, number of workers, and the run's checkpoints."""

    rank: int
    world: int

    @property
    def device(self) -> torch.device:
        """Where this worker's model belongs."""

    def report(self, folder: Path, name: str, done: int) -> None:
        """Store this rank's checkpoint files (copied or moved) as checkpoint `name`. Collective."""

    def checkpoints(self) -> Sequence[tuple[str, AbstractContextManager[Path]]]:
        """(name, folder) of the run's checkpoints, newest first. Collective."""


class Reports(Protocol):
    """Receiver of a worker's progress."""

    def begin(self) -> list[str]:
        """The workers start (again); returns the notes so far."""

    def resumed(self, done: int) -> None:
        """The run resumes after `done` rounds."""

    def note(self, *texts: str) -> None:
        """Messages for the user, each shown once."""

    def update(self, done: int, values: dict[str, float]) -> None:
        """Rounds done and the metrics of the last one."""


class ListenerReports:
    """For a worker in the listener's process."""

    def __init__(self, bar: progress.Bar):
        self.listener, self.bar, self.noted = progress.current(), bar, dict[str, None]()

    def begin(self) -> list[str]:
        """The notes so far."""
        return list(self.noted)

    def resumed(self, done: int) -> None:
        """The run resumes after `done` rounds."""
        self.listener.note("train", resumption(done))
        self.bar.at(done)

    def note(self, *texts: str) -> None:
        """Messages for the user, each shown once."""
        for text in texts:
            if text not in self.noted:
                self.noted[text] = None
                self.listener.note("note", text)

    def update(self, done: int, values: dict[str, float]) -> None:
        """Rounds done and the metrics of the last one."""
        self.bar.at(done, **losses_of(values))


def resumption(done: int) -> str:
    """The message of a run that resumes."""
    return f"resumes after round {done}"


def losses_of(values: Mapping[str, float]) -> dict[str, str]:
    """The values of a round that a bar shows."""
    return {name.removesuffix("_loss"): f"{value:.3f}" for name, value in values.items() if name.endswith("loss")}


class RaySession:
    """A worker of Ray Train."""

    def __init__(self, home: str) -> None:
        import ray.train

        self.home = home
        """The run's home; checkpoints are in <home>/train."""
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.neighbours = context.get_local_world_size()
        """Workers on this node, including this one."""
        self._taken: set[str] = set()

    @property
    def device(self) -> torch.device:
        from ray.train.torch import get_device

        device: torch.device = get_device()
        return device

    def report(self, folder: Path, name: str, done: int) -> None:
        import ray.train

        # Ray Train deletes old checkpoints by path: a skipped one must not share its path with its successor
        while name in self._taken:
            name += "_again"
        self._taken.add(name)
        with explained(join(self.home, "train", name), "checkpoint"):
            ray.train.report(
                {"round": done},
                checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
                checkpoint_dir_name=name,
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC,
                delete_local_checkpoint_after_upload=True,
            )

    def checkpoints(self) -> Sequence[tuple[str, AbstractContextManager[Path]]]:
        import ray.train

        checkpoints = [reported.checkpoint for reported in ray.train.get_all_reported_checkpoints()]
        named = [(Path(checkpoint.path).name, _as_path(checkpoint)) for checkpoint in reversed(checkpoints)]
        self._taken |= {name for name, _ in named}
        return named


@contextmanager
def _as_path(checkpoint: Any) -> Iterator[Path]:
    with checkpoint.as_directory() as folder:
        yield Path(folder)


class LocalSession:
    """The only worker of a run, in this process; checkpoints are folders of `<run>/train`."""

    rank, world = 0, 1

    def __init__(self, run_dir: str, keep: int, *, gpu: bool = False) -> None:
        self.folder, self.keep = Path(run_dir) / "train", keep
        self.device = torch.device("cuda" if gpu else "cpu")

    def report(self, folder: Path, name: str, done: int) -> None:
        numbers = [int(path.name[:6]) for path in local_checkpoints(self.folder)]
        place = self.folder / f"{max(numbers, default=-1) + 1:06d}_{name}"
        with atomic_dir(place) as staging:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
        for old in local_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)

    def checkpoints(self) -> Sequence[tuple[str, AbstractContextManager[Path]]]:
        return [(path.name, nullcontext(path)) for path in reversed(local_checkpoints(self.folder))]
