"""Search space of OFMU with the preset full: the penalty at every inner iterate, so inner steps cost more."""

from tune_spaces import Integers, ofmu_lite

SPACE = ofmu_lite.SPACE.with_priors(
    {"ofmu.inner_steps": Integers(1, 4)}, "an inner step costs twice the passes of lite (docs/method.md)"
)
