"""Who evaluates a run's own models: its workers, with the model that they hold, or processes that load it whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ofmu_ray.config import EvaluationConfig, TrainingConfig, UnlearnConfig
from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    from ofmu_ray.storage import PathLike
    from ofmu_ray.tasks.protocol import Evaluation, Task


def evaluation_of(task: Task, config: UnlearnConfig, storage: PathLike) -> Evaluation:
    """The evaluation of a run: the task's; if the workers evaluate, all models in the type of the weights they hold.

    Raises:
        UserError: rows that cannot be used; evaluation.engine is live, and the workers cannot evaluate.
    """
    evaluation: Any = task.evaluation(config, storage)
    live = evaluates_live(config, config.training, evaluation)
    typed: Evaluation = evaluation.in_type(_held_type(config)) if live else evaluation
    return typed


def evaluates_live(
    config: UnlearnConfig, training: TrainingConfig, evaluation: Evaluation, *, on_the_way: bool = False
) -> bool:
    """Whether the workers evaluate (evaluation.engine). `training`: with its engine and GPUs resolved.

    `on_the_way`: between rounds, when several workers would otherwise wait for the one that does it.

    Raises:
        UserError: evaluation.engine is live, and they cannot.
    """
    wanted = config.evaluation.engine
    needed = training.workers > 1 and (on_the_way or training.zero_stage == 3)
    if not config.evaluation.enabled or wanted == "process" or (wanted == "auto" and not needed):
        return False
    reason = _impossible(config, training, evaluation)
    if reason is not None and wanted == "live":
        raise UserError(f"evaluation.engine = live: {reason}, or --evaluation.engine process")
    return reason is None


def _held_type(config: UnlearnConfig) -> Literal["fp32", "bf16"]:
    """The type of the weights that the workers' passes read."""
    return "bf16" if config.model.precision == "bf16" else "fp32"


def _impossible(config: UnlearnConfig, training: TrainingConfig, evaluation: Any) -> str | None:
    held, asked = _held_type(config), config.evaluation.dtype
    if not hasattr(evaluation, "shared_table"):
        return f"task = {config.task!r} evaluates only models that one process holds; use another task"
    if held == "bf16" and not training.gpus:
        return "the workers hold bf16 weights, and CPUs evaluate in fp32; use --model.precision bf16_autocast"
    if asked not in ("auto", held):
        return f"the workers hold {held} weights, but evaluation.dtype = {asked}; use --evaluation.dtype auto"
    return None


def check_device_map(evaluation: EvaluationConfig) -> None:
    """Raises UserError for evaluation.device_map without GPUs. A cluster must have been joined."""
    from ofmu_ray.cluster.map_tasks import device_kind

    if evaluation.device_map is not None and device_kind() == "cpu":
        raise UserError("evaluation.device_map = auto lays a model over a node's GPUs, but there is none: drop it")
