"""The fastest set-up that fits a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ofmu_ray.config import LoraConfig
from ofmu_ray.errors import UserError
from ofmu_ray.planning.cost import Device, Link
from ofmu_ray.planning.setup import Planner, Requirements, SetUp

MOST_GPUS = 512


@dataclass(frozen=True)
class Target:
    """The constraints of a proposal."""

    memory: int
    """Usable bytes of one GPU."""
    gpus: int
    device: Device
    """For ordering set-ups by time."""
    link: Link


def propose(planner: Planner, target: Target) -> Requirements:
    """The fastest set-up that fits in memory; trains all weights if such a set-up fits, else LoRA adapters.

    Raises:
        UserError: none fits; names the largest component of the smallest set-up, and the nearest set-up that would fit.
    """
    smallest: Requirements | None = None
    given = planner.given().lora
    for lora in [given] if given is not None else [None, LoraConfig()]:
        estimates = [planner.estimate(setup) for setup in _setups(planner, target.gpus, lora)]
        fitting = [estimate for estimate in estimates if estimate.peak.bytes <= target.memory]
        if fitting:
            # ties in time: the set-up with less memory
            return min(fitting, key=lambda e: (e.time(target.device, target.link).total, e.peak.bytes))
        smallest = min([*estimates, *([smallest] if smallest else [])], key=lambda e: e.peak.bytes)
    assert smallest is not None
    raise _refusal(planner, target, smallest)


def _setups(planner: Planner, gpus: int, lora: LoraConfig | None) -> Iterator[SetUp]:
    batch = planner.training.batch_size
    if batch % gpus:
        raise UserError(f"training.batch_size = {batch} is not divisible by plan.gpus = {gpus}: make it a multiple")
    share = batch // gpus
    checkpointing = [False, True] if not planner.model.gradient_checkpointing else [True]
    engine = planner.training.engine
    stages = (0,) if engine == "torch" or (engine == "auto" and gpus == 1) else (0, 2, 3) if gpus > 1 else (0, 2)
    for micro in (size for size in range(share, 0, -1) if share % size == 0):
        for recompute in checkpointing:
            for stage in stages:
                yield SetUp(stage, gpus, micro, recompute, "none", lora)
                yield SetUp(stage, gpus, micro, recompute, "optimizer", lora)


def _refusal(planner: Planner, target: Target, smallest: Requirements) -> UserError:
    peak = smallest.peak
    largest = peak.largest
    text = (
        f"plan.gpu_memory: nothing fits {_gb(target.memory)} usable on each of {target.gpus} GPU(s). The smallest "
        f"set-up ({' '.join(smallest.setup.options())}) needs {_gb(peak.bytes)}; its largest component is {largest} "
        f"({_gb(peak.components[largest])})."
    )
    gpus = target.gpus * 2
    while gpus <= MOST_GPUS:
        setup = SetUp(3, gpus, 1, True, "optimizer", smallest.setup.lora)
        more = planner.estimate(setup)
        if planner.training.engine != "torch" and more.peak.bytes <= target.memory:
            return UserError(
                f"{text} Nearest that would fit: {gpus} GPUs of this memory at ZeRO stage 3 ({_gb(more.peak.bytes)}), "
                f"or {target.gpus} of {_gb(peak.bytes)} usable"
            )
        gpus *= 2
    return UserError(f"{text} Nearest that would fit: {target.gpus} GPU(s) of {_gb(peak.bytes)} usable")


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e9:.0f} GB"
