"""Search space of task arithmetic."""

from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("task_arithmetic.optimizer.lr"),
        Knob(
            "task_arithmetic.scale",
            LogUniform(0.3, 10.0),
            "up to 1 in the paper (arXiv 2212.04089); a short fit needs more",
        ),
    )
)
