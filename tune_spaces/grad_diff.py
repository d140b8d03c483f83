"""Search space of GradDiff."""

from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("grad_diff.optimizer.lr"),
        Knob("grad_diff.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
