"""The mathematics of OFMU (arXiv 2509.22483), over a parameter space. Imports torch and nothing else."""

from ofmu_ray.algorithm.similarity import similarity_coefficients, similarity_gradient

__all__ = ["similarity_coefficients", "similarity_gradient"]
