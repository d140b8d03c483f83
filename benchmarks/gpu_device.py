"""The device that `benchmarks/gpu.py` runs on: what it is, its rates, its clock and its failures."""

from __future__ import annotations

import gc
import importlib.metadata as metadata
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

Save = Callable[[Mapping[str, Any]], None]


class Poisoned(RuntimeError):
    """The process's CUDA context no longer works: everything after it would fail."""


def about(device: torch.device) -> dict[str, Any]:
    """The machine, and which of this project's dependencies it lacks."""
    names = (
        "ray",
        "deepspeed",
        "transformers",
        "accelerate",
        "peft",
        "mlflow",
        "rouge-score",
        "pytest",
        "numpy",
        "hjson",
        "py-cpuinfo",
        "nltk",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "packages": versions}
    found["load_average"] = os.getloadavg()[0]
    if device.type != "cuda":
        return found | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
        "driver": _driver(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def rates(device: torch.device, smoke: bool, save: Save) -> dict[str, Any]:
    """FLOP/s of matrix products by precision; bytes/s on the device and to it; seconds of the smallest operation."""
    found: dict[str, Any] = {}
    side = 256 if smoke else 8192
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"), ("fp32", torch.float32, "highest"), ("tf32", torch.float32, "high"),
    ):  # fmt: skip
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[f"{name}_flops"] = 2 * side**3 / best(device, partial(torch.matmul, a, b), 3 if smoke else 20)
        save(found)
    torch.set_float32_matmul_precision("highest")
    numel = 1 << (16 if smoke else 28)
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    found["bytes_per_second"] = 2 * 4 * numel / best(device, lambda: target.copy_(source), 10)
    wide = source[: 1 << 24].double()
    found["float64_dot_bytes_per_second"] = 8 * wide.numel() / best(device, lambda: torch.dot(wide, wide), 10)
    small = torch.zeros(8, device=device)
    found["operation_seconds"] = best(device, lambda: [small.add_(1) for _ in range(500)], 3) / 500
    host = torch.empty(numel // 4)
    found["host_to_device_pageable"] = 4 * host.numel() / best(device, lambda: target[: host.numel()].copy_(host), 3)
    if device.type == "cuda":
        pinned = host.pin_memory()
        for name, action in (
            ("host_to_device_pinned", lambda: target[: host.numel()].copy_(pinned, non_blocking=True)),
            ("device_to_host_pinned", lambda: pinned.copy_(target[: host.numel()], non_blocking=True)),
        ):
            found[name] = 4 * host.numel() / best(device, action, 5)
    return found


def best(device: torch.device, action: Callable[[], Any], repeats: int) -> float:
    action()
    return min(seconds_of(device, action) for _ in range(repeats))


def seconds_of(device: torch.device, action: Callable[[], Any]) -> float:
    finish(device)
    started = time.perf_counter()
    action()
    finish(device)
    return time.perf_counter() - started


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failure(error: BaseException, device: torch.device) -> dict[str, Any]:
    """An exception as plain values. Raises Poisoned if the device does not work any more."""
    text = "".join(traceback.format_exception(error))
    found: dict[str, Any] = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": text[-4000:]}
    if device.type == "cuda":
        try:
            torch.zeros(8, device=device).sum().item()
        except Exception:
            raise Poisoned(found["error"]) from error
        found["out_of_memory"] = isinstance(error, torch.OutOfMemoryError)
    return found
