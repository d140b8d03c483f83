"""Search space of RMU."""

from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("rmu.optimizer.lr"),
        Knob(
            "rmu.steering",
            LogUniform(1.0, 100.0),
            "2 in OpenUnlearning, 20 and more for the authors' 7 B models (arXiv 2403.03218)",
        ),
        Knob("rmu.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
