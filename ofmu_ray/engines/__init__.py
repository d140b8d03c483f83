"""Engines: one model, its parameters as (sharded) vectors, one optimiser per loop. `protocol.py` has the operations.

Names resolve on first use, so the single-process engine imports neither DeepSpeed nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofmu_ray.engines.deepspeed_engine import DeepSpeedEngine
    from ofmu_ray.engines.protocol import Batch, Engine, Loss, PassAccount, Vector
    from ofmu_ray.engines.torch_engine import TorchEngine

_HOMES = {
    "Batch": "protocol",
    "DeepSpeedEngine": "deepspeed_engine",
    "Engine": "protocol",
    "Loss": "protocol",
    "PassAccount": "protocol",
    "TorchEngine": "torch_engine",
    "Vector": "protocol",
}

__all__ = [
    "Batch",
    "DeepSpeedEngine",
    "Engine",
    "Loss",
    "PassAccount",
    "TorchEngine",
    "Vector",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
