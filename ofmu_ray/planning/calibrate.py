"""Time on this machine's CPU: passes are measured on models of one and two layers and extrapolated to all layers."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from ofmu_ray.config import OptimizerConfig
from ofmu_ray.engines import TorchEngine
from ofmu_ray.engines.protocol import sum_and_count
from ofmu_ray.errors import UserError
from ofmu_ray.methods import build_method
from ofmu_ray.models.loading import empty_model
from ofmu_ray.planning.cost import Link, RoundTime
from ofmu_ray.planning.setup import Planner, Requirements
from ofmu_ray.planning.shapes import micro_batch

REPEATS = 3
LARGEST_VECTOR = 16_000_000
"""Maximum elements of the vectors in arithmetic measurements."""


def calibrated_time(
    planner: Planner, estimate: Requirements, link: Link, clock: Callable[[], float] = time.perf_counter
) -> RoundTime:
    """Seconds of a round of `estimate`, measured on this machine with torch's current number of threads.

    `clock`: time.process_time is not affected by other processes on a busy machine.

    Raises UserError if the model's configuration does not give the number of layers.
    """
    layers = _layers(planner.shape)
    passes = 0.0
    ran = Counter(
        (replayed.kind, estimate.traces[index].precision) for index, replayed in enumerate(estimate.round.passes)
    )
    for (stream, precision), count in ran.items():
        one, two = (_pass_seconds(planner, estimate, stream, precision, depth, clock) for depth in (1, 2))
        passes += count * estimate.layout.micro_batches * max(one + (layers - 1) * (two - one), one)
    return RoundTime(
        passes, _vector_seconds(planner, estimate, clock), estimate.traffic.seconds(estimate.setup.workers, link)
    )


def _layers(shape: Any) -> int:
    layers = getattr(shape.get_text_config(), "num_hidden_layers", None)
    if not layers:
        raise UserError("plan.calibrate: the model's configuration has no num_hidden_layers; turn calibration off")
    return int(layers)


def _pass_seconds(
    planner: Planner, estimate: Requirements, stream: str, precision: str, layers: int, clock: Callable[[], float]
) -> float:
    """Forward and backward pass of a micro-batch on a model with `layers` layers and random weights."""
    shape = copy.deepcopy(planner.shape)
    text = shape.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    setup, rows = estimate.setup, planner.rows[stream]
    model = replace(planner.model, gradient_checkpointing=setup.gradient_checkpointing, lora=setup.lora, freeze=[])
    module = empty_model(shape, model, device="cpu")
    tokens = max(2, round(rows.longest))
    micro = micro_batch(shape, setup.micro_batch_size, tokens, min(round(rows.prompt), tokens - 1))
    mask = torch.ones_like(micro["labels"])
    mask[0, -1] = 0  # batches usually have padding, which selects another attention kernel
    micro["attention_mask"] = mask
    return _seconds(lambda: _run(module, micro, precision), clock)


def _run(module: torch.nn.Module, micro: Any, precision: str) -> None:
    from ofmu_ray.models.answers import causal_lm_loss

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
        value, _ = sum_and_count(causal_lm_loss(module, micro))
    value.backward()  # type: ignore[no-untyped-call]


def _vector_seconds(planner: Planner, estimate: Requirements, clock: Callable[[], float]) -> float:
    """A round of the method without its passes, on a model that is one vector."""
    layout, sizes = estimate.layout, estimate.sizes
    shard = sizes.trainable if layout.zero_stage == 0 else -(-sizes.trainable // layout.workers)
    elements = min(shard, LARGEST_VECTOR)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(elements))
    inner, outer = planner.method.optimizers
    engine = _Arithmetic(module, inner=inner, outer=outer)
    method = build_method(planner.method, planner.training.rounds)
    method.start(engine)
    counts = method.batches_per_round()
    batches = [[None] * counts.get(stream, 0) for stream in ("forget", "retain")]
    method.round(engine, iter(batches[0]), iter(batches[1]))  # the first round creates the moments
    return _seconds(lambda: method.round(engine, iter(batches[0]), iter(batches[1])), clock) * shard / elements


class _Arithmetic(TorchEngine):
    """An engine with fixed gradients: only linear algebra, steps and displacements of a round remain."""

    def __init__(self, module: torch.nn.Module, *, inner: OptimizerConfig, outer: OptimizerConfig):
        super().__init__(module, inner=inner, outer=outer)
        self._given = [torch.randn_like(self.shards.masters[0]) for _ in range(2)]

    def gradient(self, batch: Any, loss: Any = None, *, kind: Any = "forget", **_: Any) -> Any:
        self.shards.clear_gradients()
        return [self._given[kind == "retain"] * 1.0], 1.0


def _seconds(action: Callable[[], Any], clock: Callable[[], float]) -> float:
    action()
    times = []
    for _ in range(REPEATS):
        started = clock()
        action()
        times.append(clock() - started)
    return median(times)
