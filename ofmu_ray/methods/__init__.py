"""Unlearning methods, one file each, over the engines' verbs."""

from ofmu_ray.methods.ofmu import OFMU

__all__ = ["OFMU"]
