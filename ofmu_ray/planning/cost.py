"""Time and communication of a round. benchmarks/scaling.py uses the same communication model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ofmu_ray.planning.memory import FULL, LIVE_PARAMETERS, Layout, Sizes
from ofmu_ray.planning.replay import Round
from ofmu_ray.planning.trace import PassTrace


@dataclass(frozen=True)
class Link:
    """A connection between workers, in one direction."""

    bytes_per_second: float
    seconds: float
    """Latency of one message."""


# Nominal data rates (1 byte = 8 bits; nvlink: 4th generation, 450 GB/s per direction) and typical latencies;
# collectives reach about 80 % of the rates (REACHED)
LINKS: dict[str, Link] = {
    "nvlink": Link(450e9, 5e-6),
    "infiniband-400g": Link(50e9, 5e-6),
    "infiniband-200g": Link(25e9, 5e-6),
    "ethernet-100g": Link(12.5e9, 30e-6),
    "ethernet-25g": Link(3.125e9, 30e-6),
    "ethernet-10g": Link(1.25e9, 50e-6),
    "loopback": Link(1.0e9, 100e-6),
}
REACHED = 0.8


@dataclass(frozen=True)
class Device:
    """A compute device."""

    flops: float
    """Achieved FLOP/s of matrix products in the run's precision."""
    fp32_flops: float
    """The same in fp32, for passes that enter a difference (unless the weights are bf16)."""
    bytes_per_second: float
    operation_seconds: float
    """Minimum time of one operation (kernel launch, dispatch)."""


@dataclass(frozen=True)
class GPU:
    """Data sheet values: dense FLOP/s, without sparsity."""

    memory: int
    bf16: float
    fp32: float
    """Without tensor cores: torch's default for fp32 matrix products."""
    bytes_per_second: float

    def device(self, precision: str, efficiency: float) -> Device:
        rates = {"fp32": self.fp32, "tf32": self.bf16 / 2}  # TF32: half of bf16 on every data sheet
        flops, fp32 = rates.get(precision, self.bf16), self.fp32
        return Device(flops * efficiency, fp32 * efficiency, self.bytes_per_second * 0.8, 8e-6)


# NVIDIA's data sheets of the SXM variants (L4, L40S: PCIe)
GPUS: dict[str, GPU] = {
    "A100-40GB": GPU(40 * 10**9, 312e12, 19.5e12, 1.555e12),
    "A100-80GB": GPU(80 * 10**9, 312e12, 19.5e12, 2.039e12),
    "H100-80GB": GPU(80 * 10**9, 989e12, 67e12, 3.35e12),
    "H200-141GB": GPU(141 * 10**9, 989e12, 67e12, 4.8e12),
    "L4-24GB": GPU(24 * 10**9, 121e12, 30e12, 0.3e12),
    "L40S-48GB": GPU(48 * 10**9, 362e12, 91.6e12, 0.864e12),
}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one rank: their number, and the tensor bytes of each kind."""

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0
    calls: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def times(self, count: float) -> Traffic:
        return Traffic(self.all_reduce * count, self.reduce_scatter * count, self.all_gather * count,
                       round(self.calls * count))  # fmt: skip

    def sent_bytes(self, workers: int) -> float:
        """Bytes a rank sends (and receives) in ring collectives; all-reduce: reduce-scatter plus all-gather."""
        share = (workers - 1) / workers
        return share * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)

    def seconds(self, workers: int, link: Link) -> float:
        if workers == 1:
            return 0.0
        hops = 2 * (workers - 1) if workers <= 64 else 2 * workers.bit_length()  # beyond a node, NCCL uses trees
        return self.sent_bytes(workers) / (link.bytes_per_second * REACHED) + self.calls * hops * link.seconds


def pass_traffic(layout: Layout, sizes: Sizes) -> Traffic:
    """Traffic of one gradient pass."""
    micro, w = layout.micro_batches, layout.weight_bytes
    sums = Traffic(all_reduce=3 * 8, calls=1)  # loss, count, tokens
    if layout.zero_stage == 0:
        return sums + Traffic(all_reduce=sizes.trainable * FULL, calls=1)
    # DeepSpeed reduces stage 2's buckets by all-reduces (use_multi_rank_bucket_allreduce, its default)
    if layout.zero_stage < 3:
        return sums + Traffic(all_reduce=sizes.trainable * FULL, calls=1).times(micro)
    # weights are gathered in forward, and again in backward unless they fit the live parameters
    gathers = 1 if sizes.total <= LIVE_PARAMETERS else 2
    gathered = gathers * (sizes.total - sizes.persistent) * w
    reduced = Traffic(reduce_scatter=sizes.trainable * FULL, all_gather=gathered, calls=1 + 2 * gathers)
    return sums + reduced.times(micro)


def round_traffic(layout: Layout, sizes: Sizes, done: Round) -> Traffic:
    """Traffic of one round: passes, new weights after every displacement and step, inner products."""
    total = pass_traffic(layout, sizes).times(len(done.passes))
    if layout.zero_stage:
        persistent = sizes.persistent * layout.weight_bytes
        renewed = persistent if layout.zero_stage == 3 else sizes.trainable * layout.trained_bytes
        total += Traffic(all_gather=renewed, calls=1).times(done.refreshes)
        total += Traffic(all_reduce=8 * done.products, calls=done.dots)
    return total


@dataclass(frozen=True)
class RoundTime:
    """Seconds of one round."""

    passes: float
    vectors: float
    communication: float

    @property
    def total(self) -> float:
        """Assumes no overlap of communication and computation: gradients are reduced after backward."""
        return self.passes + self.vectors + self.communication


def pass_seconds(trace: PassTrace, device: Device) -> float:
    """Roofline time of a micro-batch: compute plus memory traffic, at least the kernel launches."""
    flops = device.fp32_flops if trace.precision == "fp32" else device.flops
    return max(trace.flops / flops + trace.bytes_moved / device.bytes_per_second,
               trace.operations * device.operation_seconds)  # fmt: skip


def vector_seconds(layout: Layout, sizes: Sizes, done: Round, bytes_per_second: float) -> float:
    """Linear algebra, steps, displacements and inner products of a round."""
    shard = sizes.trainable if layout.zero_stage == 0 else -(-sizes.trainable // layout.workers)
    return done.vector_bytes * shard / bytes_per_second


def flops_as_reported(sizes: Sizes, tokens: float) -> float:
    """FLOPs as the run reports them: 6 x parameters x tokens."""
    return 6.0 * sizes.total * tokens
