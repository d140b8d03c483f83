"""Search space of OFMU with its default preset, first_order."""

from ofmu_ray.config.spaces import Knob, LogUniform, Space

SPACE = Space(
    (
        Knob(
            "ofmu.inner.lr",
            LogUniform(2e-5, 1e-4),
            "the upper end of the other methods' range: the bounded loss makes large rates safe, and no draw below "
            "forgot anything on TOFU forget05 (docs/decisions.md)",
        ),
        Knob("ofmu.outer_ratio", LogUniform(0.3, 0.65), "good draws had 0.3 to 0.6 (docs/decisions.md)"),
    )
)
