"""Search space of DPO."""

from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("dpo.optimizer.lr"),
        Knob("dpo.beta", LogUniform(0.03, 1.0), "a decade around 0.1, OpenUnlearning's and the NPO paper's"),
        Knob("dpo.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
