"""Search space of SatImp."""

from ofmu_ray.config.spaces import Knob, LogUniform, Space, Uniform, rate

SPACE = Space(
    (
        rate("satimp.optimizer.lr"),
        Knob("satimp.forget_weight", LogUniform(0.03, 1.0), "OpenUnlearning's 0.1 up to the 1 of its documentation"),
        Knob("satimp.beta1", Uniform(3.0, 6.0), "around OpenUnlearning's 5"),
        Knob("satimp.beta2", Uniform(0.5, 2.0), "around OpenUnlearning's 1"),
    )
)
