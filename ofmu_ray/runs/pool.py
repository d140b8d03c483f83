"""Many runs: concurrently in warm processes, or one after the other through Ray Train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ofmu_ray.config import UnlearnConfig
from ofmu_ray.runs.trial import SplitData, Trial, run_trial, write_failure


def trial_runner(shared: Mapping[str, Any]) -> Callable[[Trial], dict[str, Any]]:
    """A function that runs trials in a worker process. `shared`: Ray references to the splits' data."""
    import ray

    import ofmu_ray.evaluation.scorer
    import ofmu_ray.training.start  # noqa: F401  imports do not count towards a trial's time

    return lambda trial: run_trial(trial, ray.get(shared[trial.split]), local=True)


class Pool:
    """Runs as many trials at a time as fit, each on one worker's share of the machine.

    With engine torch and one worker, trials run in processes that stay warm; otherwise one after the other through Ray
    Train. A trial whose process dies (out of memory, a lost node) runs again; it has failed when that has happened more
    than training.max_failures times, as in a sweep.
    """

    def __init__(self, base: UnlearnConfig, data: Mapping[str, SplitData], concurrency: int | None) -> None:
        import ray

        from ofmu_ray.cluster.map_tasks import ProcessPool
        from ofmu_ray.cluster.nodes import cluster_room

        training = base.training
        self.data, self.size = data, 1
        self.processes: ProcessPool[Trial, dict[str, Any]] | None = None
        if training.single:
            cpus, gpus = training.cpus_per_worker, training.gpus
            room = cluster_room(cpus, gpus)
            self.size = max(1, min(room, concurrency or room))
            make = partial(trial_runner, {name: ray.put(content) for name, content in data.items()})
            self.processes = ProcessPool(make, self.size, cpus=cpus, gpus=gpus, retries=training.max_failures)

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        """(trial, result) in the order of completion."""
        from ofmu_ray.cluster.map_tasks import ProcessDied

        if self.processes is None:
            for trial in trials:
                yield trial, run_trial(trial, self.data[trial.split], local=False)
            return
        for number, result in self.processes.map(trials):
            trial = trials[number]
            if isinstance(result, ProcessDied):
                result = write_failure(trial, self.data[trial.split], str(result))
            yield trial, result

    def close(self) -> None:
        """End the processes."""
        if self.processes is not None:
            self.processes.close()
