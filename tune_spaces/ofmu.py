"""Search space of OFMU with its default preset, first_order."""

from tune_spaces.spaces import Choice, Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("ofmu.inner.lr"),
        Knob("ofmu.outer_ratio", LogUniform(0.25, 0.8), "every good draw had 0.4 to 0.5 (docs/decisions.md)"),
        Knob("ofmu.forget_loss", Choice(("bounded_row", "bounded_token")), "both forgot best on some data"),
    )
)
