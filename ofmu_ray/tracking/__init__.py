"""MLflow: one run per run name, also across resumptions. Importing this package does not import MLflow."""

from ofmu_ray.tracking.late import conclude, deliver_late
from ofmu_ray.tracking.mlflow_run import RunHandle, finish, open_command, start, system_metrics
from ofmu_ray.tracking.rounds import RoundLogger

__all__ = ["RoundLogger", "RunHandle", "conclude", "deliver_late", "finish", "open_command", "start", "system_metrics"]
