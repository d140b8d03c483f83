"""Options of `ofmu plan`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ofmu_ray.config.ranges import not_negative, positive, require
from ofmu_ray.config.runs import UnlearnConfig
from ofmu_ray.errors import UserError

GPUName = Literal["A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB", "L4-24GB", "L40S-48GB"]
LinkName = Literal[
    "nvlink", "infiniband-400g", "infiniband-200g", "ethernet-100g", "ethernet-25g", "ethernet-10g", "loopback"
]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to plan for, and the assumptions."""

    gpu: GPUName | None = None
    """GPU with memory, FLOP/s and bytes/s from its data sheet; null: a CPU, with its speed from plan.calibrate."""
    gpu_memory: str | None = None
    """Memory of one GPU, e.g. 80GB or 40GiB; null: that of plan.gpu. With either of them, a setup is proposed."""
    gpus: int | None = None
    """GPUs to plan for; null: training.workers."""
    link: LinkName | None = None
    """Slowest link between workers; null: nvlink up to gpus_per_node GPUs, else infiniband-400g (a CPU: loopback)."""
    gpus_per_node: int = 8
    """GPUs per machine."""
    efficiency: float = 0.4
    """Share of the data sheet's FLOP/s that dense matrix products reach in training."""
    reserve: float = 0.08
    """Share of GPU memory to leave free: CUDA context, fragmentation, communication buffers."""
    price_per_gpu_hour: float | None = None
    """Price per GPU hour, in any currency, for the cost of the run."""
    calibrate: bool = False
    """Measure this machine (one pass of a one- and a two-layer model, vector arithmetic) and predict times for it."""
    row_tokens: int | None = None
    """Tokens of the longest row of a micro-batch; null: counted on the first rows of both streams."""
    sample_rows: int = 512
    """Rows per stream to tokenise for counting tokens."""
    print: bool = True
    """Print the plan as a table."""
    json: str | None = None
    """Also write the plan to this JSON file."""

    def __post_init__(self) -> None:
        positive("plan", self, "gpus", "gpus_per_node", "row_tokens", "sample_rows")
        not_negative("plan", self, "price_per_gpu_hour")
        require(0 < self.efficiency <= 1, "plan.efficiency", self.efficiency, "in (0, 1]")
        require(0 <= self.reserve < 1, "plan.reserve", self.reserve, "in [0, 1)")
        if self.gpu_memory is not None:
            parsed_bytes(self.gpu_memory)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(UnlearnConfig):
    """`ofmu plan`: what `ofmu unlearn` with these options will need. Takes all its options, and section plan."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    """What to plan for."""


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parsed_bytes(text: str) -> int:
    """'80GB' -> 80 000 000 000; UserError naming plan.gpu_memory otherwise."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else None
    try:
        if match is None or unit not in _UNITS:
            raise ValueError
        value = float(match[1]) * _UNITS[unit]
    except ValueError:
        raise UserError(f"plan.gpu_memory = {text!r}: must be a size such as 80GB or 40GiB") from None
    require(value > 0, "plan.gpu_memory", text, "greater than 0")
    return int(value)
