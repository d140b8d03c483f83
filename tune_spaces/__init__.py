"""Search spaces of labels that override the one in their method's file: one file each, with a `SPACE`."""

from ofmu_ray.config.methods import RATE
from ofmu_ray.search.priors import Choice, Integers, LogUniform, Prior, Uniform, ZeroOrLogUniform, parse_prior
from ofmu_ray.search.spaces import Knob, Space

__all__ = [
    "RATE",
    "Choice",
    "Integers",
    "Knob",
    "LogUniform",
    "Prior",
    "Space",
    "Uniform",
    "ZeroOrLogUniform",
    "parse_prior",
]
