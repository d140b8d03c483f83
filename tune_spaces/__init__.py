"""What is tuned of each method, and in which ranges: one file per method, one table of them here."""

from ofmu_ray.config import UnlearnConfig
from ofmu_ray.config.spaces import (
    Choice,
    Integers,
    Knob,
    LogUniform,
    Overrides,
    Prior,
    Space,
    Uniform,
    ZeroOrLogUniform,
    parse_prior,
    parse_priors,
)
from ofmu_ray.search.space_files import read_space
from tune_spaces import (
    altpo,
    blur,
    ceu,
    dpo,
    dualoptim,
    grad_diff,
    gradient_ascent,
    idk,
    npo,
    ofmu,
    ofmu_full,
    ofmu_lite,
    pdu,
    retain_finetune,
    rmu,
    satimp,
    simnpo,
    task_arithmetic,
    undial,
    wga,
)

SPACES: dict[str, Space] = {
    "ofmu": ofmu.SPACE,
    "ofmu_full": ofmu_full.SPACE,
    "ofmu_lite": ofmu_lite.SPACE,
    "gradient_ascent": gradient_ascent.SPACE,
    "grad_diff": grad_diff.SPACE,
    "npo": npo.SPACE,
    "simnpo": simnpo.SPACE,
    "rmu": rmu.SPACE,
    "idk": idk.SPACE,
    "dpo": dpo.SPACE,
    "altpo": altpo.SPACE,
    "undial": undial.SPACE,
    "wga": wga.SPACE,
    "satimp": satimp.SPACE,
    "ceu": ceu.SPACE,
    "pdu": pdu.SPACE,
    "task_arithmetic": task_arithmetic.SPACE,
    "retain_finetune": retain_finetune.SPACE,
    "blur": blur.SPACE,
    "dualoptim": dualoptim.SPACE,
}
"""Label -> space. Learning rates are for models of 1 B parameters and more (`Space.scaled`)."""


def space_for(label: str, base: UnlearnConfig, lr_scale: float = 1.0) -> Space:
    """The space of a label, or else of its configuration's method, with its learning rates times `lr_scale`."""
    return SPACES.get(label, SPACES[base.method]).scaled(lr_scale)


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
    "ZeroOrLogUniform",
    "parse_prior",
    "parse_priors",
    "read_space",
    "space_for",
]
