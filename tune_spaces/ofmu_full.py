"""Search space of OFMU with the preset full: the penalty at every inner iterate, so that inner steps cost more."""

from tune_spaces import Integers, ofmu_lite

SPACE = ofmu_lite.SPACE.with_priors(
    {"ofmu.inner_steps": Integers(1, 4)}, "an inner step costs twice as many passes as with lite (docs/method.md)"
)
