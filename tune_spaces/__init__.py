"""Search spaces by label: a file NAME.py here with a SPACE is the space of that label (a method, a preset of one, or a
label of yours); every other label has the space of its method (ofmu_ray/methods/NAME)."""

from ofmu_ray.config.spaces import (
    Choice,
    Integers,
    Knob,
    LogUniform,
    Overrides,
    Prior,
    Space,
    Uniform,
    ZeroOrLogUniform,
    parse_prior,
    parse_priors,
)

__all__ = [
    "Choice",
    "Integers",
    "Knob",
    "LogUniform",
    "Overrides",
    "Prior",
    "Space",
    "Uniform",
    "ZeroOrLogUniform",
    "parse_prior",
    "parse_priors",
]
