"""One function over many items, on warm processes of the cluster.

Evaluation, reference values, attacks and trials run this way, on a `ProcessPool`. `map_tasks` is a pool on all free
resources, for work in which every item is needed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from ofmu_ray.errors import user_error_within

Item = TypeVar("Item")
Result = TypeVar("Result")
Make = Callable[[], Callable[[Item], Result]]

SMALL_FLOPS = 2e12
"""Some 50 seconds on one core. Ray with two processes takes as long on two, and more CPU (benchmarks/README.md)."""
MOST_PROCESSES = 8
RETRIES = 3
"""Retries of an item whose process has died."""
SETTLE_SECONDS = 3.0
"""Time until the resources of processes that have just ended are free again."""


class ProcessDied(RuntimeError):
    """The process of an item died: by itself, with its node, or out of memory."""


class WarmProcess:
    """The remote side: keeps the function from `make`."""

    def __init__(self) -> None:
        self.function: Callable[[Any], Any] | None = None

    def run(self, make: list[Any], item: Any) -> Any:
        """`make`: a reference, resolved once. The function is made with the first item, so that its errors are reported
        as such and not as a dead process."""
        if self.function is None:
            import ray

            self.function = ray.get(make[0])()
        return self.function(item)


@dataclass
class _Try:
    """An item in progress."""

    number: int
    item: Any
    failures: int = 0


class ProcessPool(Generic[Item, Result]):
    """Runs `make()` once in each process; it returns the function to call on items.

    `size`: at most this many processes, each with `cpus` (one thread per CPU), `gpus` and `memory` (bytes that Ray sets
    aside for it); they start on demand and live until `close`. `nodes`: ids of nodes to place them on in turn, while
    these are alive. `make` goes to the object store once.
    """

    def __init__(
        self,
        make: Make[Item, Result],
        size: int,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        memory: int = 0,
        retries: int = 0,
        nodes: Sequence[str] = (),
    ) -> None:
        import ray

        self.size, self.cpus, self.gpus, self.retries, self.nodes = size, cpus, gpus, retries, nodes
        self.memory = memory
        self._make = [ray.put(make)]
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, _Try]] = {}
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result | ProcessDied]]:
        """(index of the item, its result) in the order of completion.

        If the process of an item dies, the item runs again in a new process, up to `retries` times; then its result is
        `ProcessDied`. The other items go on. If the caller stops early or is interrupted, busy processes are killed.

        Raises:
            UserError: raised by the function; other errors as Ray wraps them.
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
                except DIED as error:  # OutOfMemoryError is no RayActorError: the process may still be alive
                    ray.kill(process)
                    task.failures += 1
                    result = ProcessDied(f"its process died: {type(error).__name__}")
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
        options |= {"memory": self.memory} if self.memory else {}
        if self.nodes:  # soft: another node, if this one dies
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
    memory: int = 0,
    whole_nodes: bool = False,
) -> Iterator[tuple[int, Result]]:
    """(index, result) of every item in the order of completion: `ProcessPool.map` with one free CPU or GPU per
    process and at most `most` (8) processes.

    `nodes`: the nodes to use, given the resource (CPU or GPU); default: all. `memory`: bytes of host memory that a
    process takes. `whole_nodes`: a process takes all GPUs of a node. If nothing is free there, a single process shares
    a CPU with other work, or waits for a GPU.

    Raises:
        ProcessDied: an item's process died, and so did those of its three retries.
        UserError: raised by the function.
    """
    if not items:
        return
    if running_ray() is None:
        from ofmu_ray.cluster.connect import connect

        connect(1)
    from ofmu_ray.cluster.nodes import alive

    resource = "GPU" if device_kind() == "cuda" else "CPU"
    candidates = alive() if nodes is None else nodes(resource)
    share = _share(candidates, resource, memory, whole_nodes)
    free, places = _free_places(candidates, share, min(len(items), most or MOST_PROCESSES))
    cpus, gpus = (0.0, share["GPU"]) if resource == "GPU" else (float(free), 0.0)
    asked = int(share.get("memory", 0)) if free else 0
    with ProcessPool(make, len(places), cpus=cpus, gpus=gpus, memory=asked, retries=RETRIES, nodes=places) as pool:
        for number, result in pool.map(items):
            if isinstance(result, ProcessDied):
                raise result
            yield number, result


def runs_here(flops: float) -> bool:
    """Whether to run work of this size in this process: it is small for a CPU, or this process has GPUs of its own.

    A process that Ray gave a GPU, such as a trial, would otherwise wait for another one, and for itself on the last.
    """
    if device_kind() == "cpu":
        return flops < SMALL_FLOPS
    return running_ray() is None or has_own_gpu()


def device_kind() -> str:
    """cuda if work will run on GPUs (of this process, or of the cluster), else cpu."""
    ray = running_ray()
    if ray is not None:
        return "cuda" if has_own_gpu() or ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_own_gpu() -> bool:
    """Whether this is a process to which Ray gave a GPU, or a part of one."""
    ray = running_ray()
    return ray is not None and bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))


def running_ray() -> Any | None:
    """The ray module, if this process has joined a cluster."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None


def _share(candidates: Sequence[Any], resource: str, memory: int, whole_nodes: bool) -> dict[str, float]:
    """What one process takes of a node. Of memory, never more than the largest node has: Ray counts only a part of it,
    and a process that asks for more would wait forever."""
    largest = max(int(node.resources.get(resource, 0)) for node in candidates)
    share: dict[str, float] = {resource: max(1, largest) if whole_nodes and resource == "GPU" else 1}
    most = max(int(node.resources.get("memory", 0)) for node in candidates)
    return share | ({"memory": min(memory, most)} if memory and most else {})


def _free_places(candidates: Sequence[Any], share: dict[str, float], wanted: int) -> tuple[bool, Sequence[str]]:
    """Whether anything is free, and a node id for each process (nodes in turn)."""
    from ofmu_ray.internals.ray_private import free_resources

    wanted = max(1, min(wanted, sum(_fitting(node.resources, share) for node in candidates)))
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = free_resources()
        free = {node.id: _fitting(now.get(node.id, {}), share) for node in candidates}
        places = [node for turn in range(max(free.values())) for node, count in free.items() if turn < count]
        if len(places) >= wanted or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    fits = [node.id for node in candidates if _fitting(node.resources, share)] or [candidates[0].id]
    return bool(places), places[:wanted] or fits[:1]


def _fitting(resources: Mapping[str, float], share: Mapping[str, float]) -> int:
    """How many processes fit a node."""
    return min(int(resources.get(name, 0) // part) for name, part in share.items())
