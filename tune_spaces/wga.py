"""Search space of WGA."""

from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, Uniform, rate

SPACE = Space(
    (
        rate("wga.optimizer.lr"),
        Knob("wga.beta", Uniform(0.5, 2.0), "around 1, OpenUnlearning's; 0 would be GradDiff"),
        Knob("wga.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
