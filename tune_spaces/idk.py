"""Search space of IDK."""

from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("idk.optimizer.lr"),
        Knob("idk.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
