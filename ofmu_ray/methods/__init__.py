"""Unlearning methods over the engines' verbs, each in a file or folder of its own.

The configuration has a section of each, and comes first: it imports all of them (ofmu_ray.methods.registry).
"""

import ofmu_ray.config  # noqa: F401
from ofmu_ray.methods.registry import build_method

__all__ = ["build_method"]
