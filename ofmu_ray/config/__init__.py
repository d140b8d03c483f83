"""All options of the project, as frozen dataclasses.

jsonargparse turns them into the YAML schema, the ``--section.option`` overrides and the help text. Types and ranges are
checked on construction; ``pipelines/`` checks whatever depends on files or on the machine before any worker starts.
Nothing here imports torch or Ray.
"""

from ofmu_ray.config.benchmark import (
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
    PartConfig,
    SourceConfig,
    TrainDataConfig,
)
from ofmu_ray.config.evaluation import (
    EvaluationConfig,
    EvaluationSetsConfig,
    ProbeConfig,
)
from ofmu_ray.config.images import (
    ClassifierConfig,
    ImagesConfig,
    SplitConfig,
)
from ofmu_ray.config.method_sections import (
    LABELS,
    METHODS,
    PRESETS,
    SPACES,
    MethodName,
)
from ofmu_ray.config.methods import (
    FinetuneConfig,
    MethodConfig,
    OneLoopConfig,
    WeightedConfig,
)
from ofmu_ray.config.models import (
    BUILTIN_TARGET,
    ExportConfig,
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
    "BUILTIN_FORGET",
    "BUILTIN_TARGET",
    "ELASTIC",
    "LABELS",
    "METHODS",
    "PRESETS",
    "SPACES",
    "WHERE_KEPT",
    "AblationConfig",
    "BenchmarkConfig",
    "BudgetConfig",
    "ClassifierConfig",
    "DataConfig",
    "EarlyConfig",
    "EvaluationConfig",
    "EvaluationSetsConfig",
    "ExportConfig",
    "FinetuneConfig",
    "FormatConfig",
    "ImagesConfig",
    "LoraConfig",
    "MethodConfig",
    "MethodName",
    "ModelConfig",
    "OneLoopConfig",
    "OptimizerConfig",
    "PartConfig",
    "Precision",
    "ProbeConfig",
    "ReportConfig",
    "RuleConfig",
    "ScratchConfig",
    "SearchConfig",
    "SelectConfig",
    "SharedBaseConfig",
    "SourceConfig",
    "SplitConfig",
    "StopConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainDataConfig",
    "TrainingConfig",
    "TuningConfig",
    "UnlearnConfig",
    "WeightedConfig",
    "apply_overrides",
    "close_match",
    "config_hash",
    "flatten",
    "outcome_hash",
    "to_dict",
]
