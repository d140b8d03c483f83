"""Search space of BLUR."""

from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("blur.optimizer.lr"),
        Knob("blur.npo_beta", LogUniform(0.03, 1.0), "the range of NPO's own beta"),
        Knob("blur.forget_weight", LogUniform(0.3, 3.0), "half a decade around the authors' 1"),
    )
)
