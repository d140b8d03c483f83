"""The task interface: everything that unlearning needs to know about a kind of model and its rows.

Methods, engines, the training loop, runs and search use only this interface. To add a task, write a module with a
`TASK` and name it: `--task my_package.my_module`. The module must be importable on every node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from ofmu_ray.config import DataConfig, EvaluationConfig, ExportConfig, ModelConfig, TrainDataConfig, UnlearnConfig
    from ofmu_ray.data.encoder import Encoder
    from ofmu_ray.models.weights import Weights
    from ofmu_ray.storage import NewFolder, PathLike


class Evaluation(Protocol):
    """Evaluation of a run's models: before, after, and the retrained one."""

    # optional, together, for benchmark and sweep:
    # evaluation: EvaluationConfig; sets: Mapping[str, Sequence[Mapping]], its rows as JSON values; cache: PathLike
    # Tables then have the columns row_id (<set>-<index>), set and index, the metrics of the rule are declared with
    # `values`, and a model's folder has a config.json.

    def table(self, model: str | None, label: str) -> pa.Table | None:
        """Per-row values of the model at a path, with the columns row_id and set; None: not evaluated."""

    def live_table(self, module: torch.nn.Module, processor: Any, label: str) -> pa.Table:
        """The same for a model in memory, as for its export."""

    # optional, together, for evaluation.engine live; Task.round_as_exported belongs to them:
    # def shared_table(self, module: torch.nn.Module, processor: Any, label: str) -> pa.Table
    #     the same for a model that all ranks hold together, neither copied nor converted, on every rank; collective
    # def in_type(self, name: str) -> Evaluation
    #     a copy that loads other models in the type of that one's weights (fp32, bf16)
    # def stored(self, model: str) -> pa.Table | None; def store(self, model: str, table: pa.Table) -> None
    #     the cache of `table`

    def sampled(self, rows: int | None, evaluation: EvaluationConfig, seed: int) -> Evaluation:
        """The same on `rows` rows of each set (None: all). Tables keep the row ids; `metrics` restricts the retrained
        model's full table to the same rows."""

    def metrics(self, table: pa.Table | None, retrained: pa.Table | None) -> dict[str, Any] | None:
        """Metric -> {"value", "low", "high", "n"} or {"value": null, "reason"}; None without a table."""

    def verdict(self, tables: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        """More entries of metrics.json, by section, that depend on several models.

        The section `run` is merged into the run's: `degenerate` (bool or None) and `generations` (a sentence or None).
        """

    # optional, for `ofmu evaluate`: def words(self, table, metrics, target, retrained) -> dict[str, Any]
    # what `verdict` says of a run, of any model: `forgetting` and `generations`, each a sentence or None; tables and
    # metrics as there. def tokenizer_of(self, model: str) -> str, the tokenizer for the model at a path; and
    # def tokenizers(self) -> int, how many different ones there are

    # optional: def check_fits(self, model: str, option: str) -> None
    # raise UserError if the rows do not fit the model at a path, without loading its weights

    # optional: classes: Sequence[str], and def pictures(self, row_ids: Sequence[str]) -> dict[str, bytes]
    # names of the classes, and PNGs of the rows that may be shown, for the report of an image classifier

    def texts(self) -> dict[str, tuple[str, str]]:
        """Row id -> (question, answer) for the report's samples; {} if rows are not text, or private."""


class Task(Protocol):
    """A kind of model and rows."""

    offers: frozenset[str]
    """What methods may rely on: `answers` (predictions of labelled tokens, or of classes), `texts` (rows are texts, of
    a model with decoder layers), `classes` (an answer is one of few classes)."""

    # optional: rows: Literal["texts", "images"]
    # the kind of rows that its metrics are declared for (metrics.registry); without it, a rule takes any metric

    # optional: pipeline_tag: str
    # what its models do, in the hub's words, for the model card

    # ------------------------------------------------------------------------------------------------- on the driver

    # optional: def check_early(self, config: ModelConfig, option: str, layers: Mapping[str, int]) -> None
    # raise UserError for what shows before torch is imported, such as a missing folder; `check_model` follows.
    # `layers`: option of the method -> number of a layer

    def check_model(self, config: ModelConfig, option: str = "model.path") -> Any:
        """Check a model without loading its weights; returns its processor (such as a tokenizer).

        Raises:
            UserError: it is not usable; names `option`.
        """

    # optional: def check_rows(self, config: ModelConfig, longest, largest: Mapping[str, int]) -> None
    # raise UserError if the longest row of a stream (tokens), or its largest token number, does not fit the model

    def skeleton(self, config: ModelConfig) -> torch.nn.Module | None:
        """The model as `load` returns it, without weights (meta device), for checks; None: not offered.

        Raises:
            UserError: an option of the model does not fit it.
        """

    def encoder(self, processor: Any, data: DataConfig | TrainDataConfig) -> Encoder:
        """The encoder from rows to training inputs."""

    def evaluation(self, config: UnlearnConfig, storage: PathLike) -> Evaluation:
        """The evaluation of a run; reads its rows and refuses unusable ones before any worker starts."""

    # optional: def comparison(self, config: EvaluateConfig, storage: PathLike) -> Evaluation
    # the evaluation of `ofmu evaluate`; without it, that of a run of the first model

    # optional: def initial(self, folder: str, config: TrainConfig) -> None
    # write the model that `ofmu train` starts from without `model`

    # optional: def reading(self, streams, encoder: Encoder, data: DataConfig | TrainDataConfig, seed: int) -> Reading
    # what adds the payload columns that a plan does not hold (data.encoder.STORED) to its rows as they are read

    # ------------------------------------------------------------------------------------------------- on the workers

    def load(self, config: ModelConfig) -> tuple[torch.nn.Module, Any]:
        """The model, in training mode on the CPU, and its processor."""

    # optional: def load_unread(self, config: ModelConfig) -> tuple[torch.nn.Module, Any, UnreadWeights] | str
    # the same, where the engine reads the weights and a ZeRO-3 worker only its share of them; or why it cannot

    # optional: def remarks(self, config: ModelConfig) -> list[str]
    # what of the model's options this worker cannot do, for the notes of a run

    # optional: def normalisation(self, module: torch.nn.Module, *, unlearns: bool, workers: int) -> None
    # decide what batch normalisation does, before the engine is built

    def copy(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """A model like the module with these weights, in eval mode; the module may be sharded or wrapped."""

    def collate(self, processor: Any) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
        """A function from encoded rows (columns of `Encoder.payload`) to a micro-batch."""

    def loss(self, module: torch.nn.Module, micro: Any) -> tuple[torch.Tensor, Any]:
        """Sum of a micro-batch's losses (nats), and their number."""

    def utility(self, module: torch.nn.Module, micro: Any) -> torch.Tensor:
        """How well the model answers each row, 0 to 1: float64 [rows] on the CPU. The utility floor uses the mean."""

    def export(
        self,
        module: torch.nn.Module,
        processor: Any,
        weights: Weights,
        folder: NewFolder | None,
        model: ModelConfig,
        options: ExportConfig,
    ) -> None:
        """Fill a model directory: safetensors and everything `load` needs. Collective; `folder`: None except on rank 0.

        `weights.whole()` is the state dict on rank 0; larger models are read tensor by tensor.
        """

    # optional: def round_as_exported(self, module, model: ModelConfig, options: ExportConfig) -> None
    # give the weights in memory the values that `export` writes

    def exported_as_is(self, module: torch.nn.Module, model: ModelConfig, options: ExportConfig) -> bool:
        """Whether `export` keeps the bits of the module's weights, so that its evaluation is that of the export."""
