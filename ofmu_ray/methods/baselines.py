"""Which class runs which baseline's options."""

from __future__ import annotations

from typing import Any

from ofmu_ray import config
from ofmu_ray.methods.altpo import AltPO
from ofmu_ray.methods.blur import BLUR
from ofmu_ray.methods.ceu import CEU
from ofmu_ray.methods.dpo import DPO
from ofmu_ray.methods.dualoptim import DualOptim
from ofmu_ray.methods.grad_diff import GradDiff
from ofmu_ray.methods.gradient_ascent import GradientAscent
from ofmu_ray.methods.idk import IDK
from ofmu_ray.methods.npo import NPO
from ofmu_ray.methods.one_loop import OneLoop
from ofmu_ray.methods.pdu import PDU
from ofmu_ray.methods.retain_finetune import RetainFinetune
from ofmu_ray.methods.rmu import RMU
from ofmu_ray.methods.satimp import SatImp
from ofmu_ray.methods.simnpo import SimNPO
from ofmu_ray.methods.task_arithmetic import TaskArithmetic
from ofmu_ray.methods.undial import UNDIAL
from ofmu_ray.methods.wga import WGA

BASELINES: dict[type, type[OneLoop[Any]]] = {
    config.GradientAscentConfig: GradientAscent,
    config.GradDiffConfig: GradDiff,
    config.NPOConfig: NPO,
    config.SimNPOConfig: SimNPO,
    config.RMUConfig: RMU,
    config.IDKConfig: IDK,
    config.DPOConfig: DPO,
    config.AltPOConfig: AltPO,
    config.UNDIALConfig: UNDIAL,
    config.WGAConfig: WGA,
    config.SatImpConfig: SatImp,
    config.CEUConfig: CEU,
    config.PDUConfig: PDU,
    config.TaskArithmeticConfig: TaskArithmetic,
    config.RetainFinetuneConfig: RetainFinetune,
    config.BLURConfig: BLUR,
    config.DualOptimConfig: DualOptim,
}
"""Options -> method."""
