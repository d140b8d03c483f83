"""Peak memory of one rank by component, for a parallel layout.

Sizes follow from the engine (engines/shards.py, zero_shards.py) and from DeepSpeed's ZeRO as deepspeed_config sets it
up; tests/test_plan.py holds them against the measured peak of real processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ofmu_ray.planning.replay import LiveVectors, ReplayedPass, Round
from ofmu_ray.planning.trace import PassTrace

FULL = 4
"""Bytes of an element of masters, moments and vectors."""
# DeepSpeed's defaults, which deepspeed_config leaves (deepspeed/runtime/zero/config.py), in elements
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies on the ranks."""

    zero_stage: int
    """0 also for the single-process engine."""
    workers: int
    device: Literal["cpu", "cuda"]
    precision: str = "fp32"
    offload: bool = False
    """Moments in host memory between steps."""
    micro_batches: int = 1
    """Per worker and batch."""

    @property
    def weight_bytes(self) -> int:
        """Of an element of the weights that forward passes read."""
        return 2 if self.precision == "bf16" else FULL


@dataclass(frozen=True)
class Sizes:
    """Elements of a model."""

    total: int
    trainable: int
    largest: int
    """Of its largest parameter."""
    persistent: int = 0
    """Of parameters so small that stage 3 keeps them whole."""


@dataclass(frozen=True)
class Peak:
    """The moment of highest memory of one rank."""

    phase: str
    components: Mapping[str, int] = field(default_factory=dict)
    """Bytes by component; none is counted twice."""

    @property
    def bytes(self) -> int:
        return sum(self.components.values())

    @property
    def largest(self) -> str:
        return max(self.components, key=lambda name: self.components[name])


Traces = Mapping[int, PassTrace]
"""Index of a pass in the round -> its trace."""


def peaks(layout: Layout, sizes: Sizes, done: Round, traces: Traces, base: int = 0) -> dict[str, Peak]:
    """The highest moment of a round, of a checkpoint and of the export; `base`: bytes of the process before all that.

    A checkpoint copies masters and moments to host memory, the export all weights (rank 0): on CUDA that is not the
    device's memory, and both phases are left out.
    """
    parts = _Parts(layout, sizes, base)
    moments = [parts.between(done.peak)]
    for index, replayed in enumerate(done.passes):
        moments += parts.during(replayed, traces[index])
    found = {"round": max(moments, key=lambda peak: peak.bytes)}
    if layout.device == "cpu":
        rest = LiveVectors(0, done.peak.saved, done.peak.moments)
        shard = parts.vector
        copies = {"copies for the checkpoint": int((1 + rest.moments) * shard)}
        found["checkpoint"] = Peak("checkpoint", {**parts.resident(rest), **copies})
        found["export"] = Peak("export", {**parts.resident(rest), "copy of the weights": sizes.total * FULL})
    return found


def highest(found: Mapping[str, Peak]) -> Peak:
    return max(found.values(), key=lambda peak: peak.bytes)


class _Parts:
    """Components of one rank."""

    def __init__(self, layout: Layout, sizes: Sizes, base: int):
        self.layout, self.sizes, self.base = layout, sizes, base
        self.shard = sizes.trainable if layout.zero_stage == 0 else -(-sizes.trainable // layout.workers)
        self.vector = self.shard * FULL
        """Bytes of one vector."""

    def resident(self, held: LiveVectors) -> dict[str, int]:
        """What stays between passes."""
        layout, sizes, w = self.layout, self.sizes, self.layout.weight_bytes
        own = {"process": self.base}
        if layout.zero_stage == 0:
            own["weights"] = sizes.total * w
            own["gradients"] = sizes.trainable * (w + (FULL if w < FULL else 0))
            own["master weights"] = sizes.trainable * FULL if w < FULL else 0  # else they are the weights
        else:
            sharded = layout.zero_stage == 3
            own["weights"] = -(-sizes.total // layout.workers) * w if sharded else sizes.total * w
            own["master weights"] = self.vector
            own["gradients"] = self.vector if sharded else 0
            # stage 2 lets go of its bucket after a pass, stage 3 keeps it
            own["gradient bucket"] = self._bucket() if sharded else 0
        offloaded = layout.offload and layout.device == "cuda"
        own["moments"] = 0 if offloaded else int(held.moments * self.vector)
        own["saved weights"] = int(held.saved * self.vector)
        own["vectors"] = int(held.vectors * self.vector)
        return own

    def _bucket(self) -> int:
        element = FULL if self.layout.zero_stage == 3 else self.layout.weight_bytes
        # on a CPU, memory that is allocated and never written does not count
        elements = REDUCE_BUCKET if self.layout.device == "cuda" else min(REDUCE_BUCKET, self.sizes.trainable)
        return elements * element

    def between(self, held: LiveVectors) -> Peak:
        """Linear algebra; with offload, the moments of the loop that steps are on the device."""
        components = self.resident(held)
        if self.layout.offload and self.layout.device == "cuda":
            components["moments"] = int(held.moments / 2 * self.vector)
        return Peak("vectors", components)

    def during(self, replayed: ReplayedPass, trace: PassTrace) -> Iterable[Peak]:
        """Moments of one pass: the end of forward, every moment of backward, and the sum that it makes."""
        layout, held = self.layout, replayed.held
        start = self.resident(held)
        if layout.zero_stage == 0:
            yield Peak("pass", {**start, "activations": trace.peak_bytes})
            yield Peak("pass", {**start, "vectors": start["vectors"] + self.vector})
            return
        # later micro-batches add to a sum that is there already
        sums = self.vector if layout.micro_batches > 1 else 0
        start["vectors"] += sums
        if layout.zero_stage == 3:
            start["gathered weights"] = self._gathered()
            yield Peak("pass", {**start, "activations": trace.peak_bytes})
            yield Peak("pass", {**start, "vectors": start["vectors"] - sums + self.vector})
            return
        yield Peak("forward", {**start, "activations": trace.forward_bytes})
        for moment in trace.moments:
            written = layout.weight_bytes * moment.gradients_done
            bucket = min(written, self._bucket()) if layout.device == "cpu" else self._bucket()
            yield Peak("backward", {**start, "gradient bucket": bucket, "activations": moment.activation_bytes})
        # when all gradients are in the bucket: this rank's averages, and room for one more shard while they are made
        yield Peak("reduction", {**start, "gradient bucket": self._bucket(), "gradients": 2 * self.vector})

    def _gathered(self) -> int:
        """Whole parameters during a pass of stage 3, and the buffer that the last of them were gathered in."""
        sizes = self.sizes
        whole = min(sizes.total, LIVE_PARAMETERS + PREFETCH_BUCKET)
        buffer = min(sizes.total, PREFETCH_BUCKET + sizes.largest) if self.layout.workers > 1 else 0
        return (whole + buffer) * self.layout.weight_bytes
