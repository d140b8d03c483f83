"""MLflow: one run per run folder, also across resumptions. Importing this package does not import MLflow."""

from ofmu_ray.tracking.description import describe_comparison, describe_fit, describe_words
from ofmu_ray.tracking.late import conclude, deliver_late
from ofmu_ray.tracking.mlflow_run import RECORD, RunHandle, finish, open_command, recorded_run, start, system_metrics
from ofmu_ray.tracking.rounds import RoundLogger

__all__ = [
    "RECORD",
    "RoundLogger",
    "RunHandle",
    "conclude",
    "deliver_late",
    "describe_comparison",
    "describe_fit",
    "describe_words",
    "finish",
    "open_command",
    "recorded_run",
    "start",
    "system_metrics",
]
