"""Search space of SimNPO."""

from ofmu_ray.config.spaces import Knob, LogUniform, Space, Uniform, rate

SPACE = Space(
    (
        rate("simnpo.optimizer.lr"),
        Knob("simnpo.beta", Uniform(2.0, 5.5), "around OpenUnlearning's 4.5"),
        Knob(
            "simnpo.forget_weight",
            LogUniform(0.06, 1.0),
            "from half of OpenUnlearning's 0.125 to the weight of the retain loss",
        ),
    )
)
