"""What a task is: everything that unlearning has to know about a kind of model and its rows.

Methods, engines, the training loop, runs and search ask the task and know nothing else about it. To add one, write a
module with a `TASK` and name it: `--task my_package.my_module`. The module must be importable on every node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa
    import torch

    from ofmu_ray.config import DataConfig, EvaluationConfig, ModelConfig, TrainDataConfig, UnlearnConfig
    from ofmu_ray.data.encoder import Encoder
    from ofmu_ray.storage import PathLike


class Evaluation(Protocol):
    """What a run measures of its models: before, after, and the retrained one."""

    def table(self, model: str | None, label: str) -> pa.Table | None:
        """Values by row of the model at a path, with the columns row_id and set; None: nothing is measured of it."""

    def live_table(self, module: torch.nn.Module, processor: Any, label: str) -> pa.Table:
        """The same of a model in memory, as the evaluation of its export would give them."""

    def sampled(self, rows: int | None, evaluation: EvaluationConfig, seed: int) -> Evaluation:
        """The same on `rows` rows of each set (None: all); tables keep the rows' names, and `figures` of the retrained
        model's whole table are those on the same rows."""

    def figures(self, table: pa.Table | None, retrained: pa.Table | None) -> dict[str, Any] | None:
        """Metric -> {"value", "low", "high", "n"} or {"value": null, "reason"}; None without a table."""

    def verdict(self, tables: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        """More entries of metrics.json, by section: what only all models together tell.

        A section `run` is added to that of the run: `degenerate` (bool or None) and `generations` (a sentence or None).
        """

    def texts(self) -> dict[str, tuple[str, str]]:
        """Row id -> (question, answer) for the report's samples; {} where rows are no text, or private."""


class Task(Protocol):
    """One kind of model and rows."""

    offers: frozenset[str]
    """What losses of methods may rely on: `answers` (token predictions of a language model)."""

    # ------------------------------------------------------------------------------------------------- on the driver

    def check_model(self, config: ModelConfig, option: str = "model.path") -> Any:
        """Look at a model without loading its weights; returns its processor (a tokenizer, say).

        Raises:
            UserError: it cannot be used; names `option`.
        """

    def encoder(self, processor: Any, data: DataConfig | TrainDataConfig) -> Encoder:
        """How rows become what the model trains on."""

    def evaluation(self, config: UnlearnConfig, storage: PathLike) -> Evaluation:
        """The evaluation of a run; reads its rows, and refuses what cannot be used, before any worker starts."""

    # ------------------------------------------------------------------------------------------------- on the workers

    def load(self, config: ModelConfig) -> tuple[torch.nn.Module, Any]:
        """The model, in training mode on the CPU, and its processor."""

    def copy(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """A model of the module's kind with these weights, in eval mode: the module may be sharded or wrapped."""

    def collate(self, processor: Any) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
        """What makes a micro-batch of encoded rows (columns of `Encoder.payload`)."""

    def loss(self, module: torch.nn.Module, micro: Any) -> tuple[torch.Tensor, Any]:
        """Sum of a micro-batch's losses (nats) and how many they are."""

    def utility(self, module: torch.nn.Module, micro: Any) -> torch.Tensor:
        """How well each row is answered, 0 to 1: float64 [rows] on the CPU. The utility floor watches its mean."""

    def export(
        self, module: torch.nn.Module, processor: Any, weights: Mapping[str, torch.Tensor], folder: Path
    ) -> None:
        """Write a model directory: safetensors, and what `load` needs."""
