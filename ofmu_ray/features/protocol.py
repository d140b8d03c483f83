"""What a method may need to know about each row before the first round, under the reference model.

The registry is open: a method can define its own feature in its file, as a subclass of `Values` or `Tokens`.
Importing this does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

    from ofmu_ray.data.prepare import PreparedData
    from ofmu_ray.data.template import Template
    from ofmu_ray.features.reference import Reference

Row = Mapping[str, Any]
"""row_id and the payload: input_ids and prompt_tokens, or pixels and label."""
IMAGE_TOKENS = 16
"""What an image counts in a forward pass of limited tokens."""


@dataclass(frozen=True)
class Values:
    """Numbers by row id: one per row, or one per token of its answer (EOS included).

    The fields are its settings; together with its source code they form the key of the cached table.
    """

    name: ClassVar[str]
    """Name in the table and in error messages."""
    key: ClassVar[str]
    """Name in a micro-batch."""
    per_token: ClassVar[bool] = True
    dtype: ClassVar[str] = "float32"
    spells: ClassVar[bool] = True
    """Whether the values of a forget row could reveal its text: if so, they are deleted with the run."""
    in_step: ClassVar[bool] = False
    """Whether `measure` does nothing with the model but call it, equally often for every micro-batch. Then workers that
    share a model (ZeRO-3) compute the values; if not, one process loads the whole model."""

    def shape(self, config: Any) -> tuple[int, ...]:
        """Shape of one entry, for a model with this transformers config (its `get_text_config`)."""
        raise NotImplementedError

    def width(self, config: Any) -> int:
        """Numbers that a forward pass keeps per answer token."""
        return vocabulary(config)

    def resolved(self, settings: FeatureContext) -> Self:
        """A copy whose fields, with model and rows, determine the values."""
        return self

    def check(self, module: torch.nn.Module) -> None:
        """Raise UserError if the model cannot provide them."""

    def measure(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The entries of a collated micro-batch, row after row: [rows, *shape] or [answer tokens, *shape]."""
        raise NotImplementedError

    def read(self, reference: Reference, rows: Sequence[Row]) -> list[np.ndarray]:
        """The entries of each row, [1 or answer tokens, *shape]."""
        import torch

        entries = self.measure(reference.module, reference.collated(rows)).cpu()
        return [piece.numpy() for piece in torch.split(entries, [self.entries(row) for row in rows])]

    def entries(self, row: Row) -> int:
        """How many entries a row has."""
        return answer_tokens(row) if self.per_token else 1


@dataclass(frozen=True)
class FeatureContext:
    """The run that needs the features."""

    method: str = ""
    root: str | None = None
    """Root of relative paths."""
    seed: int = 0


class Reading(Protocol):
    """A quantity computed from rows with the reference model."""

    def read(self, reference: Reference, rows: Sequence[Row]) -> list[np.ndarray]:
        """The results, one per row."""


class Reader(Protocol):
    """The reference model where it is: in processes that load it, or shared by the run's workers."""

    @property
    def config(self) -> Any:
        """transformers' config of the text model."""

    def read(
        self, reading: Reading, rows: Sequence[Row], lengths: np.ndarray, wide: np.ndarray, title: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(row number, the model's result for it), once per row. `lengths`, `wide`: tokens of each row, and the
        elements of logits that its pass keeps, by which rows are cut into batches."""


@dataclass(frozen=True)
class Tokens:
    """Another text for each row, such as a refusal, as tokens in the micro-batch alongside those of the answer."""

    prefix: ClassVar[str]
    """Prefix of their names in a micro-batch: `prefix` + input_ids, attention_mask or labels."""
    reads_model: ClassVar[bool] = False
    """Whether the reference model gives them."""

    @property
    def count(self) -> int | None:
        """How many a row has, under `numbered` ids: epoch e uses e modulo `count`. None: one, under the row's id."""
        return None

    def resolved(self, settings: FeatureContext) -> Self:
        """A copy whose fields fully determine the texts. Raises UserError."""
        return self

    def rows(self, model: Reader, rows: Sequence[Row], template: Template) -> list[dict[str, Any]]:
        """The rows with these texts as their answers."""
        raise NotImplementedError


@dataclass(frozen=True)
class ParameterValues:
    """Named tensors from all rows of a stream, such as one per trained parameter, for the method's `given`; deleted
    with the run."""

    name: ClassVar[str]
    in_step: ClassVar[bool] = False
    """Whether `compute` does nothing with the model but call it. Then workers that share a model (ZeRO-3) compute the
    tensors; if not, one process loads the whole model."""

    def resolved(self, settings: FeatureContext, prepared: PreparedData) -> Self:
        """A copy whose fields, with model and rows, determine the tensors. Raises UserError."""
        return self

    def compute(self, reference: Reference, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU."""
        raise NotImplementedError


@dataclass(frozen=True)
class Need:
    """A feature of a stream's rows; with `of`, values at these tokens instead of the answer's."""

    stream: str
    feature: Values | Tokens | ParameterValues
    of: Tokens | None = None


def answer_tokens(row: Row) -> int:
    """Tokens of a row's answer, EOS included; an image's class is one."""
    return len(row["input_ids"]) - int(row["prompt_tokens"]) if "input_ids" in row else 1


def row_tokens(row: Row) -> int:
    """Tokens of a row, which limit the rows of a forward pass."""
    return len(row["input_ids"]) if "input_ids" in row else IMAGE_TOKENS


def vocabulary(config: Any) -> int:
    """Number of tokens, or of classes, that a model predicts."""
    return int(getattr(config, "vocab_size", None) or config.num_labels)
