"""Search space of PDU."""

from ofmu_ray.config.spaces import Knob, LogUniform, Space, rate

SPACE = Space(
    (
        rate("pdu.optimizer.lr"),
        Knob("pdu.dual_start", LogUniform(1.0, 100.0), "1 in OpenUnlearning; its documentation advises 50 to 100"),
        Knob("pdu.dual_rate", LogUniform(0.1, 10.0), "a decade around OpenUnlearning's 1"),
    )
)
