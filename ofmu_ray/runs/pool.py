"""Many runs at a time: a pool of warm processes, or Ray Train one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ofmu_ray.config import UnlearnConfig
from ofmu_ray.runs.trial import SplitData, Trial, run_trial, write_failure


class TrialActor:
    """A process that stays warm: imports, and what the operating system holds of models and data."""

    def __init__(self, threads: int) -> None:
        import torch

        import ofmu_ray.evaluation.scorer
        import ofmu_ray.training.start  # noqa: F401

        torch.set_num_threads(threads)

    def run(self, trial: Trial, data: SplitData) -> dict[str, Any]:
        return run_trial(trial, data, local=True)


class Pool:
    """Runs trials as many at a time as fit, each on one worker's share of the machine.

    Engine torch with one worker: in Ray actors that stay warm. Otherwise one after the other through Ray Train.
    """

    def __init__(self, base: UnlearnConfig, data: Mapping[str, SplitData], concurrency: int | None) -> None:
        import ray

        training = base.training
        self.data = data
        self.local = training.engine == "torch" and training.workers == 1
        self.cpus, self.gpus = training.cpus_per_worker, training.gpus_per_worker
        self.shared = {name: ray.put(content) for name, content in data.items()} if self.local else {}
        resources = ray.cluster_resources()
        fitting = [int(resources.get("CPU", 1) // self.cpus)] if self.cpus else []
        fitting += [int(resources.get("GPU", 0) // self.gpus)] if self.gpus else []
        self.size = max(1, min([*fitting, concurrency or min(fitting)])) if self.local else 1
        self.actors: list[Any] = []

    def _actor(self) -> Any:
        import ray

        from ofmu_ray.training.launch import WORKER_ENVIRONMENT

        threads = max(1, int(self.cpus))
        environment = WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
        remote = ray.remote(TrialActor).options(
            num_cpus=self.cpus, num_gpus=self.gpus, runtime_env={"env_vars": environment}
        )
        return remote.remote(threads)

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Any]]]:
        """(trial, result) in the order of completion."""
        if not self.local:
            for trial in trials:
                yield trial, run_trial(trial, self.data[trial.split], local=False)
            return
        import ray

        waiting = list(reversed(trials))
        running: dict[Any, tuple[Any, Trial]] = {}
        idle = list(self.actors)
        while waiting or running:
            while waiting and len(running) < self.size:
                actor = idle.pop() if idle else self._new_actor()
                trial = waiting.pop()
                running[actor.run.remote(trial, self.shared[trial.split])] = actor, trial
            [done], _ = ray.wait(list(running), num_returns=1)
            actor, trial = running.pop(done)
            try:
                result = ray.get(done)
                idle.append(actor)
            # killed: by Ray for its memory (OutOfMemoryError is no RayActorError), or by the operating system
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                self.actors.remove(actor)
                ray.kill(actor)
                result = write_failure(trial, self.data[trial.split], f"its process ended: {type(error).__name__}")
            yield trial, result

    def _new_actor(self) -> Any:
        self.actors.append(self._actor())
        return self.actors[-1]

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
