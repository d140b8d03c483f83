"""What is tuned of each method, and in which ranges: one file per method, one table of them here."""

from tune_spaces import (
    blur,
    ceu,
    dpo,
    grad_diff,
    gradient_ascent,
    idk,
    npo,
    ofmu,
    pdu,
    retain_finetune,
    rmu,
    satimp,
    simnpo,
    task_arithmetic,
    undial,
    wga,
)
from tune_spaces.spaces import (
    Choice,
    Integers,
    Knob,
    LogUniform,
    Overrides,
    Prior,
    Space,
    Uniform,
    parse_prior,
)

SPACES: dict[str, Space] = {
    "ofmu": ofmu.SPACE,
    "gradient_ascent": gradient_ascent.SPACE,
    "grad_diff": grad_diff.SPACE,
    "npo": npo.SPACE,
    "simnpo": simnpo.SPACE,
    "rmu": rmu.SPACE,
    "idk": idk.SPACE,
    "dpo": dpo.SPACE,
    "undial": undial.SPACE,
    "wga": wga.SPACE,
    "satimp": satimp.SPACE,
    "ceu": ceu.SPACE,
    "pdu": pdu.SPACE,
    "task_arithmetic": task_arithmetic.SPACE,
    "retain_finetune": retain_finetune.SPACE,
    "blur": blur.SPACE,
}
"""Method -> its space. Learning rates are for models of 1 B parameters and more (`Space.scaled`)."""

__all__ = [
    "SPACES",
    "Choice",
    "Integers",
    "Knob",
    "LogUniform",
    "Overrides",
    "Prior",
    "Space",
    "Uniform",
    "parse_prior",
]
