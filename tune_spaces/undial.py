"""Search space of UNDIAL."""

from ofmu_ray.config.spaces import Choice, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("undial.optimizer.lr", 10.0),
        Knob("undial.beta", LogUniform(3.0, 30.0), "half a decade around OpenUnlearning's 10"),
        Knob("undial.retain_weight", Choice((0.0, 1.0)), "OpenUnlearning's 0, and the weight of the other methods"),
    )
)
