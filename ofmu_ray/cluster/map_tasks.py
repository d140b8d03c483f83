"""One function over many items, on processes of the cluster that stay warm.

Evaluation, reference values, attacks and trials are spread this way. `ProcessPool` is what they share; `map_tasks` is
a pool on whatever is free, for work of which every piece is needed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from ofmu_ray.errors import user_error_within

Item = TypeVar("Item")
Result = TypeVar("Result")
Make = Callable[[], Callable[[Item], Result]]

SMALL_FLOPS = 5e11
"""About ten seconds of one core: starting processes would take longer."""
MOST_PROCESSES = 8
RETRIES = 3
"""How often an item is tried again whose process has ended."""
SETTLE_SECONDS = 3.0
"""What processes that have just ended held is free again within this."""


class ProcessDied(RuntimeError):
    """The process that had an item ended: by itself, with its node, or killed for its memory."""


class WarmProcess:
    """The remote side: keeps the function that `make` gave."""

    def __init__(self) -> None:
        self.function: Callable[[Any], Any] | None = None

    def run(self, make: list[Any], item: Any) -> Any:
        """`make`: a reference, followed once. Making the function with the first item lets an error name itself
        instead of a dead process."""
        if self.function is None:
            import ray

            self.function = ray.get(make[0])()
        return self.function(item)


@dataclass
class _Try:
    """An item on its way."""

    number: int
    item: Any
    failures: int = 0


class ProcessPool(Generic[Item, Result]):
    """`make()` is called once in each process and returns the function that is called on items there.

    `size`: processes at most, each with `cpus` (and a thread per CPU) and `gpus`; they start when there is work, and
    live until `close`. `nodes`: ids of those on which they are placed by turns, as long as these live. `make` goes to
    the object store once.
    """

    def __init__(
        self,
        make: Make[Item, Result],
        size: int,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        retries: int = 0,
        nodes: Sequence[str] = (),
    ) -> None:
        import ray

        self.size, self.cpus, self.gpus, self.retries, self.nodes = size, cpus, gpus, retries, nodes
        self._make = [ray.put(make)]
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, _Try]] = {}
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result | ProcessDied]]:
        """(number of the item, its result) in the order of completion.

        An item whose process ended is run again up to `retries` times, in a new process, and then handed back as
        `ProcessDied`; the others go on. Whoever stops early, or is interrupted, ends the processes that are at work.

        Raises:
            UserError: what the function raised, if it is a user's mistake; other errors as Ray wraps them.
        """
        import ray

        from ofmu_ray.cluster.nodes import DIED

        waiting = [_Try(number, item) for number, item in enumerate(items)][::-1]
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.size:
                    process, task = self._idle.pop() if self._idle else self._start(), waiting.pop()
                    self._running[process.run.remote(self._make, task.item)] = process, task
                [done], _ = ray.wait(list(self._running), num_returns=1)
                process, task = self._running[done]
                try:
                    result = ray.get(done)
                    self._idle.append(process)
                except DIED as error:  # OutOfMemoryError is no RayActorError, and its process may live
                    ray.kill(process)
                    task.failures += 1
                    result = ProcessDied(f"its process ended: {type(error).__name__}")
                except ray.exceptions.RayTaskError as error:
                    raise user_error_within(error) or error from None
                del self._running[done]
                if 0 < task.failures <= self.retries and isinstance(result, ProcessDied):
                    waiting.append(task)
                else:
                    yield task.number, result
        finally:
            for process, _ in self._running.values():
                ray.kill(process)
            self._running.clear()

    def _start(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from ofmu_ray.cluster.connect import worker_environment

        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.nodes:  # soft: elsewhere, if that node ends
            node = self.nodes[self._started % len(self.nodes)]
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        self._started += 1
        environment = {"env_vars": worker_environment(self.cpus)}
        return ray.remote(WarmProcess).options(**options, runtime_env=environment).remote()

    def close(self) -> None:
        """End the processes."""
        import ray

        for process in self._idle:
            ray.kill(process)
        self._idle.clear()


def map_tasks(
    make: Make[Item, Result],
    items: Sequence[Item],
    *,
    most: int | None = None,
    nodes: Callable[[str], Sequence[Any]] | None = None,
) -> Iterator[tuple[int, Result]]:
    """(number, result) of every item in the order of completion: `ProcessPool.map` with a free CPU or GPU for each
    process, at most `most` (8) of them.

    `nodes`: the nodes to take, given the resource (CPU or GPU); all, if left out. When nothing is free there, a single
    process shares a CPU with whatever runs there, or waits for a GPU.

    Raises:
        ProcessDied: an item's process ended, and those of its three retries.
        UserError: of the function.
    """
    if not items:
        return
    if running_ray() is None:
        from ofmu_ray.cluster.connect import connect

        connect(1)
    resource = "GPU" if device_kind() == "cuda" else "CPU"
    free, places = _free_places(resource, min(len(items), most or MOST_PROCESSES), nodes)
    cpus, gpus = (0.0, 1.0) if resource == "GPU" else (float(free), 0.0)
    with ProcessPool(make, len(places), cpus=cpus, gpus=gpus, retries=RETRIES, nodes=places) as pool:
        for number, result in pool.map(items):
            if isinstance(result, ProcessDied):
                raise result
            yield number, result


def runs_here(flops: float) -> bool:
    """Whether work of this size is done in this process: it is little for a CPU, or this process has the only GPU."""
    if device_kind() == "cpu":
        return flops < SMALL_FLOPS
    return running_ray() is None


def device_kind() -> str:
    """cuda when work will run on GPUs (the cluster's, or this process's without Ray), otherwise cpu."""
    ray = running_ray()
    if ray is not None:
        return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def running_ray() -> Any | None:
    """The module, if this process has joined a cluster."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None


def _free_places(
    resource: str, wanted: int, nodes: Callable[[str], Sequence[Any]] | None
) -> tuple[bool, Sequence[str]]:
    """Whether anything is free, and a node's id for each process, the nodes taking turns."""
    from ofmu_ray.cluster.nodes import alive
    from ofmu_ray.internals.ray_private import free_resources

    found = alive() if nodes is None else nodes(resource)
    wanted = max(1, min(wanted, sum(int(node.resources.get(resource, 0)) for node in found)))
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = free_resources()
        free = {node.id: int(now.get(node.id, {}).get(resource, 0)) for node in found}
        places = [node for turn in range(max(free.values())) for node, count in free.items() if turn < count]
        if len(places) >= wanted or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return bool(places), places[:wanted] or [found[0].id]
