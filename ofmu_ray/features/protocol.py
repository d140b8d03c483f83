"""What a method may ask to be known about each row before the first round, under the reference model.

The registry is open: a method brings a feature of its own as a subclass of `Values` or `Tokens`, in its own file.
Importing this costs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ofmu_ray.data.template import Template
    from ofmu_ray.features.reference import Reference, ReferenceModel

Row = Mapping[str, Any]
"""row_id, input_ids, prompt_tokens."""


@dataclass(frozen=True)
class Values:
    """Numbers by row id: one for each row, or one for each token of its answer (EOS included).

    Fields of the dataclass are its settings; they and the source of its module decide which cached table is taken.
    """

    name: ClassVar[str]
    """Of the table, and in error messages."""
    key: ClassVar[str]
    """Name in a micro-batch."""
    per_token: ClassVar[bool] = True
    dtype: ClassVar[str] = "float32"
    spells: ClassVar[bool] = True
    """Whether those of a forget row could give its text away: then they do not outlive the run."""

    def shape(self, config: Any) -> tuple[int, ...]:
        """Of one entry, for a model of this configuration of transformers (its `get_text_config`)."""
        raise NotImplementedError

    def width(self, config: Any) -> int:
        """Numbers that a forward pass holds for each token of an answer."""
        return int(config.vocab_size)

    def check(self, module: torch.nn.Module) -> None:
        """Raise UserError when the model cannot give them."""

    def measure(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The entries of a collated micro-batch, row after row: [rows, *shape] or [answer tokens, *shape]."""
        raise NotImplementedError

    def read(self, reference: Reference, rows: Sequence[Row]) -> list[np.ndarray]:
        """The entries of each row, [1 or answer tokens, *shape]."""
        import torch

        entries = self.measure(reference.module, reference.collated(rows)).cpu()
        return [piece.numpy() for piece in torch.split(entries, [self.entries(row) for row in rows])]

    def entries(self, row: Row) -> int:
        """How many a row has."""
        return answer_tokens(row) if self.per_token else 1


@dataclass(frozen=True)
class FeatureContext:
    """The run that asks."""

    method: str = ""
    root: str | None = None
    """Where relative paths start from."""
    seed: int = 0


@dataclass(frozen=True)
class Tokens:
    """Another text for each row, such as a refusal, as tokens that a micro-batch holds beside those of the answer."""

    prefix: ClassVar[str]
    """Of their names in a micro-batch: `prefix` + input_ids, attention_mask or labels."""

    @property
    def count(self) -> int | None:
        """How many a row has, under `numbered` ids: epoch e takes number e modulo `count`. None: one, under its own."""
        return None

    def resolved(self, settings: FeatureContext) -> Self:
        """With all that decides the texts in its fields. Raises UserError."""
        return self

    def rows(self, model: ReferenceModel, rows: Sequence[Row], template: Template) -> list[dict[str, Any]]:
        """The rows' texts, as rows whose answer they are."""
        raise NotImplementedError


@dataclass(frozen=True)
class Need:
    """A feature of a stream's rows; with `of`, values of these other tokens in place of the answers'."""

    stream: str
    feature: Values | Tokens
    of: Tokens | None = None


def answer_tokens(row: Row) -> int:
    """Tokens of a row's answer, EOS included."""
    return len(row["input_ids"]) - int(row["prompt_tokens"])
