"""Run the units of a model on processes of the cluster, or in this process."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ofmu_ray.cluster.map_tasks import device_kind, map_tasks, runs_here
from ofmu_ray.data.template import Template
from ofmu_ray.evaluation.scorer import Scorer
from ofmu_ray.evaluation.units import Result, Unit
from ofmu_ray.models.exporting import stored_types
from ofmu_ray.models.loading import pretrained

if TYPE_CHECKING:
    from ofmu_ray.cluster.nodes import Node


@dataclass(frozen=True)
class Loading:
    """How every process loads the same model. A folder must be readable on every node; a URI is fetched there."""

    model: str
    weights_bytes: int
    tokenizer: Any
    template: Template
    max_new_tokens: int
    dtype: torch.dtype = torch.float32
    device_map: str | None = None
    """auto: over all GPUs that the process has (accelerate)."""
    trust_remote_code: bool = False

    def scorer(self, device: str) -> Scorer:
        """Loads the weights in `dtype`.

        Raises UserError if the folder contains no causal language model in safetensors.
        """
        spread = self.device_map if device == "cuda" else None
        model = pretrained(
            self.model,
            "model",
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            **({} if spread is None else {"device_map": spread}),
        )
        if spread is None:  # accelerate has placed it otherwise
            model = model.to(device)
        return Scorer(model.eval(), self.tokenizer, self.template, max_new_tokens=self.max_new_tokens)

    @property
    def host_bytes(self) -> int:
        """Host memory that a process on a CPU needs for the weights."""
        return sum(numel for _, numel in stored_types(self.model).values()) * self.dtype.itemsize


def run_units(units: Sequence[Unit], loading: Loading, actors: int | None) -> Iterator[tuple[int, Result]]:
    """(index of the unit, result) in the order of completion; every unit exactly once.

    `actors`: None is one process per free CPU or GPU (at most 8) of the nodes that have the weights, and none for a
    small job on CPUs. Without a running Ray, the work runs in this process.
    """
    flops = _flops(units, loading) if actors is None else math.inf
    if runs_here(flops):
        yield from loading.scorer(device_kind()).run_all(units)
        return
    make, nodes = partial(_runner, loading, device_kind()), partial(holders, loading.model)
    memory = 0 if device_kind() == "cuda" else loading.host_bytes
    yield from map_tasks(
        make, units, most=actors, nodes=nodes, memory=memory, whole_nodes=loading.device_map is not None
    )


def _runner(loading: Loading, device: str) -> Callable[[Unit], Result]:
    return loading.scorer(device).run


def _flops(units: Sequence[Unit], loading: Loading) -> float:
    """Two operations per weight and token, with all generations at maximum length."""
    weights = loading.weights_bytes / 4  # assumes fp32: too low by at most a factor of 2
    texts = [text for unit in units for row in unit.texts for text in row]
    scored = sum(len(ids) for ids, _ in texts)
    return 2 * weights * (scored + loading.max_new_tokens * sum(len(unit.rows) for unit in units))


def holders(model: str, resource: str) -> list[Node]:
    """The nodes with CPUs or GPUs that have a model's weights, in a folder or the hub's cache; all nodes, if none."""
    from ofmu_ray.cluster.nodes import alive, on_each

    nodes = [node for node in alive() if node.resources.get(resource, 0) >= 1] or alive()
    if len(nodes) == 1:
        return nodes
    return [node for node, answer in on_each(nodes, _has_weights, model).items() if answer is True] or nodes


def _has_weights(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return os.path.isdir(model) or isinstance(try_to_load_from_cache(model, "config.json"), str)
