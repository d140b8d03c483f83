"""Unlearning methods on top of the engines, each in its own file or folder.

The configuration has a section for each and is imported first: it imports all of them (ofmu_ray.methods.registry).
"""

import ofmu_ray.config  # noqa: F401
from ofmu_ray.methods.registry import build_method

__all__ = ["build_method"]
