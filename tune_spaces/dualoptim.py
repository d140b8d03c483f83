"""Search space of DualOptim+."""

from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("dualoptim.optimizer.lr"),
        Knob(
            "dualoptim.forget_lr_ratio",
            LogUniform(0.3, 10.0),
            "half a decade below the authors' 1 to a decade above",
        ),
        Knob(
            "dualoptim.forget_weight",
            LogUniform(0.03, 1.0),
            "around the authors' 0.1, up to the 1 of their scripts",
        ),
    )
)
