"""Peak memory of one rank by component, for a parallel layout.

Sizes follow from the engine (engines/shards.py, zero_shards.py) and from DeepSpeed's ZeRO as set up by
deepspeed_config; tests/test_plan.py compares them with the measured peak of real processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ofmu_ray.planning.replay import LiveVectors, ReplayedPass, Round
from ofmu_ray.planning.trace import PassTrace

FULL = 4
"""Bytes per element of masters, moments and vectors."""
# DeepSpeed's defaults in elements (deepspeed/runtime/zero/config.py), unchanged by deepspeed_config
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is distributed over the ranks."""

    zero_stage: int
    """0 for the single-process engine as well."""
    workers: int
    device: Literal["cpu", "cuda"]
    precision: str = "fp32"
    offload: bool = False
    """Moments in host memory between steps."""
    micro_batches: int = 1
    """Per worker and batch."""
    adapters: bool = False
    """Only LoRA adapters are trained, in fp32."""

    @property
    def weight_bytes(self) -> int:
        """Bytes per element of the weights in forward passes."""
        return 2 if self.precision == "bf16" else FULL

    @property
    def trained_bytes(self) -> int:
        """The same of what is trained."""
        return FULL if self.adapters else self.weight_bytes


@dataclass(frozen=True)
class Sizes:
    """Elements of a model."""

    total: int
    trainable: int
    largest: int
    """Elements of the largest parameter."""
    persistent: int = 0
    """Elements of parameters so small that stage 3 does not shard them."""
    stored: tuple[int, ...] = ()
    """Elements of each parameter that is in the model's files (adapters are not)."""


@dataclass(frozen=True)
class Files:
    """Bytes between a model's files and the ranks, without the files' headers."""

    model: int = 0
    """The weights of the model that comes in."""
    read: int = 0
    """Of these by one rank, the one that reads most."""
    written: int = 0
    """The exported weights, by rank 0."""
    held: int = 0
    """In host memory at a time: the largest file, or all of them with what they are made from."""
    whole: str | None = None
    """Why every rank loads the whole model before ZeRO-3 cuts it; None: it reads its share."""


NO_FILES = Files()


@dataclass(frozen=True)
class Peak:
    """The moment of peak memory on a rank."""

    phase: str
    components: Mapping[str, int] = field(default_factory=dict)
    """Bytes by component, without double counting."""

    @property
    def bytes(self) -> int:
        return sum(self.components.values())

    @property
    def largest(self) -> str:
        return max(self.components, key=lambda name: self.components[name])


Traces = Mapping[int, PassTrace]
"""Index of a pass in the round -> its trace."""


def peaks(
    layout: Layout, sizes: Sizes, done: Round, traces: Traces, base: int = 0, files: Files = NO_FILES
) -> dict[str, Peak]:
    """The peaks of loading, a round, a checkpoint and the export; `base`: bytes of the process before all that.

    A checkpoint copies masters, moments and kept vectors to host memory, the export one file of weights (rank 0). On
    CUDA this is not device memory, and both phases are skipped.
    """
    parts = _Parts(layout, sizes, base)
    moments = [parts.between(done.peak)]
    for index, replayed in enumerate(done.passes):
        moments += parts.during(replayed, traces[index])
    phases = {"loading": parts.loading(files), "round": max(moments, key=lambda peak: peak.bytes)}
    if layout.device == "cpu":
        rest = LiveVectors(done.between, done.peak.saved, done.peak.moments)
        shard = parts.vector
        copies = {"copies for the checkpoint": int((1 + rest.moments + done.kept) * shard)}
        phases["checkpoint"] = Peak("checkpoint", {**parts.resident(rest), **copies})
        held = {"exported weights": files.held}
        phases["export"] = Peak("export", {**parts.resident(rest), **held})
    return phases


def highest(phases: Mapping[str, Peak]) -> Peak:
    return max(phases.values(), key=lambda peak: peak.bytes)


class _Parts:
    """Memory components of a rank."""

    def __init__(self, layout: Layout, sizes: Sizes, base: int):
        self.layout, self.sizes, self.base = layout, sizes, base
        self.shard = sizes.trainable if layout.zero_stage == 0 else -(-sizes.trainable // layout.workers)
        self.vector = self.shard * FULL
        """Bytes of one vector."""

    def resident(self, live: LiveVectors) -> dict[str, int]:
        """Memory that stays between passes."""
        layout, sizes, trained = self.layout, self.sizes, self.layout.trained_bytes
        own = {"process": self.base}
        weights = (sizes.total - sizes.trainable) * layout.weight_bytes + sizes.trainable * trained
        if layout.zero_stage == 0:
            own["weights"] = weights
            own["gradients"] = sizes.trainable * (trained + (FULL if trained < FULL else 0))
            own["master weights"] = sizes.trainable * FULL if trained < FULL else 0  # otherwise the weights
        else:
            sharded = layout.zero_stage == 3
            own["weights"] = -(-weights // layout.workers) if sharded else weights
            own["master weights"] = self.vector
            own["gradients"] = self.vector if sharded else 0
            # stage 2 frees its bucket after a pass, stage 3 keeps it
            own["gradient bucket"] = self._bucket() if sharded else 0
        offloaded = layout.offload and layout.device == "cuda"
        own["moments"] = 0 if offloaded else int(live.moments * self.vector)
        own["saved weights"] = int(live.saved * self.vector)
        own["vectors"] = int(live.vectors * self.vector)
        return own

    def _bucket(self) -> int:
        element = FULL if self.layout.zero_stage == 3 else self.layout.trained_bytes
        # on a CPU, allocated memory that is never written does not count
        elements = REDUCE_BUCKET if self.layout.device == "cuda" else min(REDUCE_BUCKET, self.sizes.trainable)
        return elements * element

    def loading(self, files: Files) -> Peak:
        """The engine is built, and the largest parameter is read last; DeepSpeed has made its gradient shard.

        A model that is loaded whole is on the device first.
        """
        own = self.resident(LiveVectors(0, 0, 0))
        if self.layout.zero_stage:
            own |= {"gradients": self.vector, "gradient bucket": 0}
        if files.whole is not None and self.layout.zero_stage == 3:
            return Peak("loading", {**own, "whole model": self.sizes.total * self.layout.weight_bytes})
        return Peak("loading", {**own, "largest parameter": self.sizes.largest * self.layout.weight_bytes})

    def between(self, live: LiveVectors) -> Peak:
        """Linear algebra; with offload, the moments of the stepping loop are on the device."""
        components = self.resident(live)
        if self.layout.offload and self.layout.device == "cuda":
            components["moments"] = int(live.moments / 2 * self.vector)
        return Peak("vectors", components)

    def during(self, replayed: ReplayedPass, trace: PassTrace) -> Iterable[Peak]:
        """Peaks in a pass: the end of forward, points in backward, and the gradient sum."""
        layout, live = self.layout, replayed.live
        start = self.resident(live)
        if layout.zero_stage == 0:
            yield Peak("pass", {**start, "activations": trace.peak_bytes})
            yield Peak("pass", {**start, "vectors": start["vectors"] + self.vector})
            return
        # later micro-batches add to an existing sum
        sums = self.vector if layout.micro_batches > 1 else 0
        start["vectors"] += sums
        if layout.zero_stage == 3:
            start["gathered weights"] = self._gathered()
            yield Peak("pass", {**start, "activations": trace.peak_bytes})
            yield Peak("pass", {**start, "vectors": start["vectors"] - sums + self.vector})
            return
        yield Peak("forward", {**start, "activations": trace.forward_bytes})
        for moment in trace.moments:
            written = layout.trained_bytes * moment.gradients_done
            bucket = min(written, self._bucket()) if layout.device == "cpu" else self._bucket()
            yield Peak("backward", {**start, "gradient bucket": bucket, "activations": moment.activation_bytes})
        # with all gradients in the bucket: this rank's averages, and one more shard while they are computed
        yield Peak("reduction", {**start, "gradient bucket": self._bucket(), "gradients": 2 * self.vector})

    def _gathered(self) -> int:
        """Full parameters during a pass of stage 3, and the buffer of the last gather."""
        sizes = self.sizes
        gathered = min(sizes.total, LIVE_PARAMETERS + PREFETCH_BUCKET)
        buffer = min(sizes.total, PREFETCH_BUCKET + sizes.largest) if self.layout.workers > 1 else 0
        return (gathered + buffer) * self.layout.weight_bytes
