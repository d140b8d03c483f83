"""A run in progress: its name and hash, its phases, its MLflow run, and where its rounds run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ofmu_ray.config import ModelConfig, TrainConfig, UnlearnConfig
from ofmu_ray.runs.claims import Claim
from ofmu_ray.runs.job import REQUESTED, Spec
from ofmu_ray.runs.preflight import engine_of, needs_no_ray, public
from ofmu_ray.storage import join, name_of

if TYPE_CHECKING:
    from ofmu_ray.training.worker_job import WorkerJob


@dataclass
class Run:
    """A run in progress."""

    config: UnlearnConfig | TrainConfig
    storage: str
    digest: str
    """Hash of everything that determines the outcome."""
    command: Sequence[str] = ()
    """For the report and the manifest; empty if a Python program started the run."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase."""

    @property
    def kind(self) -> str:
        """`unlearn` or `train`."""
        return "train" if isinstance(self.config, TrainConfig) else "unlearn"

    @property
    def home(self) -> str:
        """<storage>/<name>, a folder or a URI."""
        prefix = "train" if isinstance(self.config, TrainConfig) else self.config.method
        return join(self.storage, self.config.name or f"{prefix}-{self.digest[:8]}")

    @property
    def claim(self) -> Claim:
        """What claims the run's name."""
        config = self.config
        sources = {"train": config.data.source} if isinstance(config, TrainConfig) else config.sources
        options = public(config)
        return Claim(self.home, self.kind, self.digest, options, config.overwrite, sources, config.data.root)

    def is_requested(self, stream: str) -> bool:
        """Whether a pipeline wrote the files of a stream for this run."""
        own = join(self.home, REQUESTED)
        return any(path.startswith(own) for path in self.claim.sources[stream].paths)

    def is_private(self, stream: str) -> bool:
        """Whether tokens of a stream go with the run: forget rows, and files that a pipeline wrote for this run."""
        return stream == "forget" or self.is_requested(stream)

    @cached_property
    def here(self) -> bool:
        """Whether the rounds run in this process, without Ray."""
        return needs_no_ray(self.config.training, self.home)

    def spec(self, model: ModelConfig) -> Spec:
        """What the workers are told of the configuration, for a model that all nodes find."""
        spec = Spec.of(self.config, model)
        return replace(spec, training=replace(spec.training, engine=engine_of(spec.training, self.home)))

    @property
    def cache(self) -> str:
        """Folder of the storage's caches."""
        return join(self.storage, "cache")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the run."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def tracked(this_run: Run, tags: dict[str, str]) -> Iterator[Any]:
    """The MLflow run for a block; closed if the block raises."""
    from ofmu_ray import tracking

    config = this_run.config
    record = join(this_run.home, tracking.RECORD)
    name = name_of(this_run.home)
    handle = tracking.start(config.tracking, this_run.storage, name, public(config), tags, record=record)
    try:
        with tracking.system_metrics(handle, enabled=config.tracking.system_metrics):
            yield handle
    except KeyboardInterrupt:
        tracking.finish(handle, status="KILLED")
        raise
    except BaseException:
        tracking.finish(handle, status="FAILED")
        raise


@contextmanager
def threads(this_run: Run) -> Iterator[None]:
    """Give torch a worker's number of threads for what runs in this process."""
    if not this_run.here:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(this_run.config.training.cpus_per_worker)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit_rounds(this_run: Run, job: WorkerJob) -> dict[str, Any]:
    """The rounds, in this process or by Ray Train's workers; the content of training.json."""
    if this_run.here:
        from ofmu_ray.training.start import fit_here

        return fit_here(job, this_run.kind)
    from ofmu_ray.training.launch import fit

    return fit(job, this_run.kind)
