"""Search space of IDK."""

from tune_spaces.spaces import NEAR_ONE, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("idk.optimizer.lr"),
        Knob("idk.retain_weight", LogUniform(0.5, 10.0), NEAR_ONE),
    )
)
