"""Every option of the project, declared once, as frozen dataclasses.

jsonargparse turns them into the YAML schema, the ``--section.option`` overrides and the help text. A value's type
and range are checked when it is built; what depends on files or on the machine is checked in ``pipelines/``
before any worker starts. Nothing here imports torch or Ray.
"""

from ofmu_ray.config.baselines import (
    AltPOConfig,
    BLURConfig,
    CEUConfig,
    DPOConfig,
    DualOptimConfig,
    GradDiffConfig,
    GradientAscentConfig,
    IDKConfig,
    NPOConfig,
    OneLoopConfig,
    PDUConfig,
    RetainFinetuneConfig,
    RMUConfig,
    SatImpConfig,
    SimNPOConfig,
    TaskArithmeticConfig,
    UNDIALConfig,
    WeightedConfig,
    WGAConfig,
)
from ofmu_ray.config.benchmark import (
    LABELS,
    AblationConfig,
    BenchmarkConfig,
    BudgetConfig,
    RuleConfig,
    TuningConfig,
)
from ofmu_ray.config.data import (
    BUILTIN_FORGET,
    DataConfig,
    FormatConfig,
    SourceConfig,
    TrainDataConfig,
)
from ofmu_ray.config.evaluation import (
    EvaluationConfig,
    EvaluationSetsConfig,
    ProbeConfig,
)
from ofmu_ray.config.methods import (
    BOUNDED,
    METHODS,
    PRESETS,
    FinetuneConfig,
    MethodConfig,
    MethodName,
    OFMUConfig,
    PresetName,
)
from ofmu_ray.config.models import (
    BUILTIN_TARGET,
    LoraConfig,
    ModelConfig,
    Precision,
    ScratchConfig,
)
from ofmu_ray.config.optimizers import (
    OptimizerConfig,
    SharedBaseConfig,
)
from ofmu_ray.config.overrides import (
    apply_overrides,
)
from ofmu_ray.config.runs import (
    ReportConfig,
    TrackingConfig,
    TrainConfig,
    UnlearnConfig,
)
from ofmu_ray.config.sweep import (
    EarlyConfig,
    SearchConfig,
    SelectConfig,
    SweepConfig,
)
from ofmu_ray.config.training import (
    StopConfig,
    TrainingConfig,
)
from ofmu_ray.config.values import (
    ELASTIC,
    WHERE_KEPT,
    close_match,
    config_hash,
    flatten,
    outcome_hash,
    to_dict,
)

__all__ = [
    "BOUNDED",
    "BUILTIN_FORGET",
    "BUILTIN_TARGET",
    "ELASTIC",
    "LABELS",
    "METHODS",
    "PRESETS",
    "WHERE_KEPT",
    "AblationConfig",
    "AltPOConfig",
    "BLURConfig",
    "BenchmarkConfig",
    "BudgetConfig",
    "CEUConfig",
    "DPOConfig",
    "DataConfig",
    "DualOptimConfig",
    "EarlyConfig",
    "EvaluationConfig",
    "EvaluationSetsConfig",
    "FinetuneConfig",
    "FormatConfig",
    "GradDiffConfig",
    "GradientAscentConfig",
    "IDKConfig",
    "LoraConfig",
    "MethodConfig",
    "MethodName",
    "ModelConfig",
    "NPOConfig",
    "OFMUConfig",
    "OneLoopConfig",
    "OptimizerConfig",
    "PDUConfig",
    "Precision",
    "PresetName",
    "ProbeConfig",
    "RMUConfig",
    "ReportConfig",
    "RetainFinetuneConfig",
    "RuleConfig",
    "SatImpConfig",
    "ScratchConfig",
    "SearchConfig",
    "SelectConfig",
    "SharedBaseConfig",
    "SimNPOConfig",
    "SourceConfig",
    "StopConfig",
    "SweepConfig",
    "TaskArithmeticConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainDataConfig",
    "TrainingConfig",
    "TuningConfig",
    "UNDIALConfig",
    "UnlearnConfig",
    "WGAConfig",
    "WeightedConfig",
    "apply_overrides",
    "close_match",
    "config_hash",
    "flatten",
    "outcome_hash",
    "to_dict",
]
