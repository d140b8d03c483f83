"""The nodes of the cluster that this process has joined: which are alive, what fits on them, a small task on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

GONE = (
    ray.exceptions.NodeDiedError,
    ray.exceptions.TaskUnschedulableError,
    ray.exceptions.WorkerCrashedError,
)
"""What Ray raises if the node of a task has died."""
DIED = (*GONE, ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""What Ray raises if a process has died: with its node, by itself, or out of memory."""
ANSWER_SECONDS = 120.0
"""A node that starts no process within this time is unusable."""


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    address: str
    resources: Mapping[str, float] = field(compare=False)
    """Total resources, in use or not: CPU, GPU, object_store_memory (bytes), ..."""


def alive() -> list[Node]:
    """The live nodes of the cluster, in a stable order."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return sorted((Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"]) for n in nodes), key=lambda n: n.id)


def here() -> Node:
    """The node of this process."""
    own = ray.get_runtime_context().get_node_id()
    return next(node for node in alive() if node.id == own)


def on(node: Node) -> NodeAffinitySchedulingStrategy:
    """Scheduling strategy: this node only, even if it dies."""
    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def room(nodes: Iterable[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many workers fit, each with its CPUs and GPUs on one node. `nodes`: resources by node."""
    needs = [(name, need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
    return sum(min(int(node.get(name, 0.0) / need + 1e-9) for name, need in needs) for node in nodes)


def cluster_room(cpus: float, gpus: float) -> int:
    """`room` on the nodes of the cluster."""
    return room((node.resources for node in alive()), cpus, gpus)


def share_words(cpus: float, gpus: float) -> str:
    """The resources of a worker or node, in words."""
    return f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")


def on_each(nodes: Sequence[Node], function: Callable[..., Any], *arguments: Any) -> dict[Node, Any]:
    """`function(*arguments)` in a process on each node, all at once and without reserving a CPU.

    An exception becomes the node's value; a node without an answer gets TimeoutError. Nodes that die meanwhile are
    skipped. Not `map_tasks`: there is nothing to balance or keep warm, each process belongs to its node, and a node
    without an answer must not block the rest.
    """
    task, small = ray.remote(function), {"num_cpus": 0, "max_retries": 0}
    running = {task.options(**small, scheduling_strategy=on(node)).remote(*arguments): node for node in nodes}
    done, waiting = ray.wait(list(running), num_returns=len(running), timeout=ANSWER_SECONDS)
    answers: dict[Node, Any] = {running[task]: TimeoutError(f"no answer in {ANSWER_SECONDS:g} s") for task in waiting}
    for reference in done:
        try:
            answers[running[reference]] = ray.get(reference)
        except GONE:
            continue
        except ray.exceptions.RayTaskError as error:
            answers[running[reference]] = error.cause or error
    return answers
