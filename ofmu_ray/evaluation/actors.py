"""Units of work spread over a pool of Ray actors, or done here when Ray is not running."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.scorer import Result, Scorer, Unit
from ofmu_ray.models.loading import pretrained

if TYPE_CHECKING:
    from ofmu_ray.cluster.nodes import Node

_MOST_ACTORS = 8
_SMALL_FLOPS = 5e11  # about ten seconds of one core: starting actors would take longer
_SETTLE_SECONDS = 3.0  # what processes that have just ended held is free again within this
_RESTARTS = 3  # of an actor whose process or node died; the units it had are run again
_ACTOR_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Loading:
    """How every process comes by the same model. A folder has to be readable on every node; a URI is fetched there."""

    model: str
    weights_bytes: int
    tokenizer: Any
    template: Template
    max_new_tokens: int
    trust_remote_code: bool = False

    def scorer(self, device: str) -> Scorer:
        """Loads the weights: fp32 on a CPU, as stored on a GPU.

        Raises UserError when the folder holds no causal language model in safetensors.
        """
        model = pretrained(
            self.model,
            "model",
            dtype="auto" if device == "cuda" else "float32",
            trust_remote_code=self.trust_remote_code,
        )
        return Scorer(model.to(device).eval(), self.tokenizer, self.template, max_new_tokens=self.max_new_tokens)


class EvaluationActor:
    """One process with the model in memory."""

    def __init__(self, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.device = device
        self.scorer: Scorer | None = None

    def run(self, number: int, unit: Unit, loading: list[Any]) -> tuple[int, Result]:
        """`loading`: a reference to the `Loading`, followed once per process. Loading at the first unit lets an error
        name itself instead of a dead actor; an argument of the constructor could be gone when the actor restarts."""
        if self.scorer is None:
            import ray

            self.scorer = ray.get(loading[0]).scorer(self.device)
        return number, self.scorer.run(unit)


def device_kind() -> str:
    """cuda when the evaluation will run on GPUs (the cluster's, or this process's without Ray), otherwise cpu."""
    ray = _running_ray()
    if ray is not None:
        return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_units(units: Sequence[Unit], loading: Loading, actors: int | None) -> Iterator[tuple[int, Result]]:
    """(number of the unit, result) in the order of completion; every unit exactly once.

    `actors`: None takes one per free CPU or GPU (at most 8), and none for a small job on CPUs. Without actors, or
    without a running Ray, the work is done in this process. An actor whose process dies is started again, up to three
    times, and its unit with it.
    """
    ray = _running_ray()
    small = actors is None and device_kind() == "cpu" and _flops(units, loading) < _SMALL_FLOPS
    if ray is None or small:
        yield from loading.scorer(device_kind()).run_all(units)
        return
    from ray.util import ActorPool

    shared = [ray.put(loading)]
    pool = _start(ray, loading.model, actors, len(units))
    try:
        jobs = list(enumerate(units))
        yield from ActorPool(pool).map_unordered(lambda actor, job: actor.run.remote(*job, shared), jobs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        for actor in pool:
            ray.kill(actor)


def _flops(units: Sequence[Unit], loading: Loading) -> float:
    """Two operations per weight and token, every generation at its longest."""
    weights = loading.weights_bytes / 4  # as if fp32: at most a factor 2 too few
    texts = [text for unit in units for row in unit.texts for text in row]
    scored = sum(len(ids) for ids, _ in texts)
    return 2 * weights * (scored + loading.max_new_tokens * sum(len(unit.rows) for unit in units))


def _start(ray: Any, model: str, actors: int | None, units: int) -> list[Any]:
    """One CPU (one thread) or one GPU each, spread over the nodes that hold the weights. An actor beyond what is free
    there would wait for ever: it is not started, and when nothing is free a single actor shares a CPU with whatever
    runs there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    device = device_kind()
    resource = "GPU" if device == "cuda" else "CPU"
    nodes = holders(model, resource)
    wanted = min(sum(int(node.resources.get(resource, 0)) for node in nodes), units, actors or _MOST_ACTORS)
    deadline = time.monotonic() + _SETTLE_SECONDS
    while len(free := _free(nodes, resource)) < wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    share = 1 if free else 0
    places = (free or [nodes[0].id])[: max(1, wanted)]
    actor = ray.remote(EvaluationActor)
    options = {
        "num_cpus": share if resource == "CPU" else 0,
        "num_gpus": share if resource == "GPU" else 0,
        "max_restarts": _RESTARTS,
        "max_task_retries": -1,
        "runtime_env": {"env_vars": _ACTOR_ENVIRONMENT},
    }
    there = [NodeAffinitySchedulingStrategy(place, soft=True) for place in places]  # elsewhere, if that node ends
    return [actor.options(**options, scheduling_strategy=node).remote(device, 1) for node in there]


def holders(model: str, resource: str) -> list[Node]:
    """The nodes with CPUs or GPUs where a model's weights lie, in a folder or in the hub's cache; all, if on none."""
    from ofmu_ray.cluster.nodes import alive, on_each

    nodes = [node for node in alive() if node.resources.get(resource, 0) >= 1] or alive()
    if len(nodes) == 1:
        return nodes
    return [node for node, found in on_each(nodes, _holds, model).items() if found is True] or nodes


def _holds(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return os.path.isdir(model) or isinstance(try_to_load_from_cache(model, "config.json"), str)


def _free(nodes: Sequence[Node], resource: str) -> list[str]:
    """A node's id for each CPU or GPU that is free there, the nodes taking turns."""
    from ray._private.state import available_resources_per_node

    now = available_resources_per_node()
    free = {node.id: int(now.get(node.id, {}).get(resource, 0)) for node in nodes}
    return [node for turn in range(max(free.values())) for node, count in free.items() if turn < count]


def _running_ray() -> Any | None:
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None
