"""Options of the training loop."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

from ofmu_ray.config.ranges import not_negative, positive, require
from ofmu_ray.errors import UserError


def resolved_engine(engine: str, workers: int, offload: str) -> str:
    """Resolves `auto` to torch or deepspeed."""
    if engine == "auto":
        return "torch" if workers == 1 and offload == "none" else "deepspeed"
    return engine


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the training loop runs."""

    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """deepspeed (ZeRO, any number of workers) or torch (one worker, supports exact curvature). auto: torch for one
    worker, deepspeed for several or with offload. torch runs its worker in the command's process, without Ray, unless
    RAY_ADDRESS names a cluster, the command is a submitted job, or the storage is a URI."""
    workers: int = 1
    """Ray Train workers (processes)."""
    cpus_per_worker: float = 1.0
    """CPU cores per worker (also its number of compute threads)."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs per worker; 0: CPU with gloo, otherwise CUDA with NCCL. auto: 1 if this machine, or the cluster, has a GPU
    for every worker, else 0."""
    placement: Literal["pack", "spread"] = "pack"
    """pack: workers on as few nodes as possible, for little traffic between nodes; spread: on as many nodes as
    possible, for more memory and disk per worker."""
    network_interface: str | None = None
    """Network of the workers: the name of an interface, or a subnet (10.1.0.0/16) if names differ between nodes; null:
    the interface with the node's address in the Ray cluster."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what is sharded over the workers."""
    decay_norms: bool = False
    """Whether weight decay also shrinks norms and biases (parameters with fewer than two dimensions)."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: keep the optimisers' moments in host memory between steps."""
    compile: bool = False
    """torch.compile for the passes of training, which changes their rounding. Passes are eager, and the run says so, at
    ZeRO-3 and where a forward pass does not compile; a backward pass that does not ends the run."""
    rounds: int = 20
    """Rounds of the method (for OFMU: K outer iterations)."""
    batch_size: int = 8
    """Rows of one batch, over all workers; the gradient accumulation follows from it."""
    micro_batch_size: int | None = None
    """Rows per forward pass and worker; null: the worker's complete share of a batch."""
    checkpoint_every: int = 10
    """Rounds between checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep."""
    max_failures: int = 3
    """Worker failures before a run gives up."""
    round_timeout: float | None = 1800.0
    """Seconds after which a round (with its checkpoint) counts as hung: its workers restart from the last checkpoint.
    null: never. The default is the timeout of torch.distributed for a single collective."""
    node_timeout: float = 1800.0
    """Seconds to wait for nodes with room for all workers: at the start, if the cluster can grow, and after losing a
    node. Then the run stops; start it again to resume."""

    def __post_init__(self) -> None:
        names = ("workers", "cpus_per_worker", "rounds", "batch_size", "micro_batch_size", "checkpoint_every")
        positive("training", self, *names, "keep_checkpoints", "round_timeout", "node_timeout")
        not_negative("training", self, "max_failures")
        if self.gpus_per_worker != "auto":
            not_negative("training", self, "gpus_per_worker")
        if self.workers > 1 and 0 < self.gpus < 1:
            raise UserError(
                f"training.gpus_per_worker = {self.gpus:g}: NCCL does not let workers share a GPU; use 1, 0 for CPUs, "
                "or --training.workers 1"
            )
        if self.gpus > 1:
            raise UserError(
                f"training.gpus_per_worker = {self.gpus:g}: a worker computes on one GPU, the others would be idle; "
                "use 1 and more --training.workers"
            )
        if self.batch_size % self.workers:
            raise UserError(
                f"training.batch_size = {self.batch_size} does not divide over training.workers = {self.workers}: "
                "make the batch a multiple of the workers"
            )
        share = self.batch_size // self.workers
        if self.micro_batch_size and share % self.micro_batch_size:
            raise UserError(
                f"training.micro_batch_size = {self.micro_batch_size} does not divide a worker's share of the batch "
                f"({self.batch_size} / {self.workers} = {share} rows): choose a divisor of {share}"
            )
        if self.engine == "torch" and self.workers > 1:
            raise UserError(
                f"training.engine = torch runs in one process, but training.workers = {self.workers}: "
                "use --training.engine deepspeed or --training.workers 1"
            )
        if self.network_interface is not None and "/" in self.network_interface:
            try:
                ipaddress.ip_network(self.network_interface, strict=False)
            except ValueError:
                raise UserError(
                    f"training.network_interface = {self.network_interface!r}: neither the name of an interface nor a "
                    "subnet such as 10.1.0.0/16"
                ) from None

    @property
    def gpus(self) -> float:
        """GPUs per worker; `auto` counts as 0 until a run has looked at the machine."""
        return 0.0 if self.gpus_per_worker == "auto" else self.gpus_per_worker

    @property
    def single(self) -> bool:
        """Whether the engine is torch, which needs no process group."""
        return resolved_engine(self.engine, self.workers, self.offload) == "torch"

    @property
    def accumulation(self) -> int:
        """Micro-batches per batch and worker."""
        return self.batch_size // self.workers // (self.micro_batch_size or self.batch_size // self.workers)


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When to stop before the last round. The last good weights are kept."""

    utility_floor: float | None = None
    """Stop if the mean answer probability on a fixed sample of retain rows falls below this fraction of its start."""
    check_every: int = 5
    """Rounds between checks of the floor."""
    sample: int = 64
    """Retain rows in the sample."""
    max_passes: int | None = None
    """End the run before the round that would exceed this many gradient passes (forget and retain); null: no limit."""
    max_flops: float | None = None
    """The same in FLOPs (6 x parameters x tokens); a round is expected to cost as much as the earlier ones."""
    forgotten: int | None = 3
    """End the run after this many consecutive rounds without an ascent step, because every forget row was already at
    its level (ofmu.forget_level); null: never."""
    max_rollbacks: int = 2
    """A round that is not finite rolls the run back to its last good checkpoint, at most this often; then it stops."""
    shrink: float = 0.5
    """Factor on both learning rates after each rollback."""

    def __post_init__(self) -> None:
        positive("stop", self, "check_every", "sample", "max_passes", "max_flops", "forgotten")
        not_negative("stop", self, "max_rollbacks")
        require(0 < self.shrink < 1, "stop.shrink", self.shrink, "between 0 and 1")
        if self.utility_floor is not None:
            require(0 < self.utility_floor <= 1, "stop.utility_floor", self.utility_floor, "in (0, 1]")
