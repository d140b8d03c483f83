"""Every option of the project, declared once, as frozen dataclasses.

jsonargparse turns them into the YAML schema, the ``--section.option`` overrides and the help text. A value's type
and range are checked when it is built; what depends on files or on the machine is checked by ``runs/`` before any
worker starts. Nothing here imports torch or Ray.
"""

from typing import TYPE_CHECKING, Any

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
from ofmu_ray.config.method_options import (
    FinetuneConfig,
    MethodConfig,
    OneLoopConfig,
    WeightedConfig,
    method_names,
    options_of,
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
    "BUILTIN_FORGET",
    "BUILTIN_TARGET",
    "ELASTIC",
    "LABELS",
    "WHERE_KEPT",
    "AblationConfig",
    "BenchmarkConfig",
    "BudgetConfig",
    "DataConfig",
    "EarlyConfig",
    "EvaluationConfig",
    "EvaluationSetsConfig",
    "FinetuneConfig",
    "FormatConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "OneLoopConfig",
    "OptimizerConfig",
    "Precision",
    "ProbeConfig",
    "ReportConfig",
    "RuleConfig",
    "ScratchConfig",
    "SearchConfig",
    "SelectConfig",
    "SharedBaseConfig",
    "SourceConfig",
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


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The options of every method by the name of their class: those of a new method are here at once."""
        for method in method_names():
            if options_of(method).__name__ == name:
                return options_of(method)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
