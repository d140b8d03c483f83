"""Search space of AltPO."""

from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("altpo.optimizer.lr"),
        Knob("altpo.beta", LogUniform(0.03, 1.0), "OpenUnlearning's grid for AltPO, 0.05 to 0.5, and NPO's own range"),
        Knob("altpo.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
