"""The mathematics of OFMU (arXiv 2509.22483) over a parameter space. Imports only torch.

Names resolve on first use, so importing the schedules does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofmu_ray.algorithm.similarity import similarity_coefficients, similarity_gradient

__all__ = ["similarity_coefficients", "similarity_gradient"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ofmu_ray.algorithm import similarity

    return getattr(similarity, name)
