"""Search space of NPO."""

from ofmu_ray.config.spaces import NEAR_ONE, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("npo.optimizer.lr"),
        Knob(
            "npo.beta", LogUniform(0.03, 1.0), "0.1 in the paper (arXiv 2404.05868), which compares values from 0 to 1"
        ),
        Knob("npo.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
