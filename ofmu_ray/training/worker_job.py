"""What the driver sends to the workers: one picklable value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ofmu_ray.config import ExportConfig, MethodConfig, ModelConfig, StopConfig, TrainingConfig
from ofmu_ray.methods import build_method
from ofmu_ray.methods.protocol import Method
from ofmu_ray.training.live import LiveEvaluation
from ofmu_ray.training.stages import Stages

if TYPE_CHECKING:
    from ofmu_ray.features.value_tables import Missing


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Everything a worker needs; paths and URIs are on storage shared by all nodes."""

    run_dir: str
    """Folder or URI of the run; the exported model goes to <run_dir>/model."""
    plan_dir: str
    """The batch plan (ofmu_ray.data.batch_plan)."""
    config_hash: str
    """Stored in every checkpoint: checkpoints of another configuration are refused."""
    seed: int
    model: ModelConfig
    method: MethodConfig
    training: TrainingConfig
    stop: StopConfig
    utility_rows: str | None
    """Parquet of tokenised retain rows for the utility floor; None: no floor."""
    export: ExportConfig = field(default_factory=ExportConfig)
    task: str = "causal_lm"
    """Name of the task (ofmu_ray.tasks)."""
    tracking: Any = None
    """ofmu_ray.tracking.RunHandle; None: no tracking."""

    reading: Any = None
    """Completes the rows of the plan as they are read (ofmu_ray.data.shard_files.Reading); None: they are complete."""
    sidecars: Mapping[str, str] = field(default_factory=dict)
    """Stream -> folder of precomputed features of its rows (ofmu_ray.data.sidecar)."""
    references: Sequence[Missing] = ()
    """What the workers compute before their first round: the sidecars name it, or the method takes it (`measured`)."""
    start_from: str | None = None
    """Folder of another run's checkpoint to start from (same ZeRO stage); None: the reference model."""
    stages: Stages | None = None
    """Evaluations during the run, after each of which a scheduler may end it; None: none."""
    live: LiveEvaluation | None = None
    """The workers evaluate the models before and after; None: others do."""

    def build_method(self) -> Method:
        """The method, with its options."""
        return build_method(self.method, self.training.rounds)
