"""Unlearning methods. A method is a folder here, found by its name:

    NAME/__init__.py   OPTIONS (a dataclass), SPACE (what is tuned), perhaps PRESETS; imports no torch
    NAME/method.py     METHOD, the class that runs rounds over an engine's verbs

Option sections, `--method`, labels, search spaces and planning follow from that (ofmu_ray.config.method_options).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ofmu_ray.config.method_options import MethodConfig
    from ofmu_ray.methods.protocol import Method


def build_method(config: MethodConfig, rounds: int | None = None) -> Method:
    """The method whose options these are; `rounds` of the whole run, for the schedules of learning rates."""
    from ofmu_ray.config.method_options import FinetuneConfig

    if isinstance(config, FinetuneConfig):
        from ofmu_ray.methods.finetune import Finetune

        return Finetune(config, rounds)
    method: Method = importlib.import_module(f"{type(config).__module__}.method").METHOD(config, rounds)
    return method
