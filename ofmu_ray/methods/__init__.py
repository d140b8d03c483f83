"""Unlearning methods, one file each, over the engines' verbs."""

from __future__ import annotations

from ofmu_ray.config import FinetuneConfig, MethodConfig, OFMUConfig
from ofmu_ray.methods.finetune import Finetune
from ofmu_ray.methods.ofmu import OFMU
from ofmu_ray.methods.protocol import Method

__all__ = ["OFMU", "build_method"]


def build_method(config: MethodConfig, rounds: int | None = None) -> Method:
    """The method whose options these are; `rounds` of the whole run, for the courses of learning rates."""
    if isinstance(config, OFMUConfig):
        return OFMU(config, rounds)
    if isinstance(config, FinetuneConfig):
        return Finetune(config, rounds)
    from ofmu_ray.methods.baselines import BASELINES

    return BASELINES[type(config)](config, rounds)
