"""What can be known about rows under the reference model before a run: quantities by name, which a method may add to.

    register(Quantity("surprise", "reference_surprise", surprise, per="row"))   # beside the method that needs it
    Need("forget", "surprise")                                                  # in the method's `needs`

The micro-batches of the stream then hold `reference_surprise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ofmu_ray.algorithm.losses import row_sums, token_nll
from ofmu_ray.data.batch import IGNORED
from ofmu_ray.engines.layers import chosen_layer, decoder_layers, layer_output
from ofmu_ray.models.answers import answers

ANSWERED = ("refusal", "alternative")
"""Needs that are texts instead of numbers: refusals to the row's question, answers that the model itself gives."""


@dataclass(frozen=True)
class Sampling:
    """How alternatives are drawn from the reference model."""

    count: int
    """Alternatives of each row."""
    temperature: float
    top_k: int
    max_new_tokens: int
    prompt: str | None = None
    """What the model is asked instead of the question, with {question} and {answer}; None: the question."""


@dataclass(frozen=True)
class Need:
    """Something about each row of a stream that is computed once, before the first round, and stored by row id."""

    stream: str
    quantity: str
    """Of `QUANTITIES`; or refusal (tokens), alternative (drawn by `sampling`, one an epoch), refusal_nll (nll of that
    text)."""
    layer: int | None = None
    """Of activations; None: engines.layers.chosen_layer."""
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Quantity:
    """Numbers of each row."""

    name: str
    key: str
    """Its name in a micro-batch."""
    measure: Callable[[torch.nn.Module, Mapping[str, Any], int | None], torch.Tensor]
    """(model, micro-batch, layer) -> [rows, *shape], or [answer tokens, *shape] row after row; EOS is a token."""
    per: Literal["row", "token"] = "token"
    shape: Callable[[Any], tuple[int, ...]] = lambda _: ()
    """Of an entry, from the model's configuration."""
    dtype: str = "float32"
    head: bool = True
    """Whether it runs the output head, so that batches are cut to what its logits take."""
    tells: bool = True
    """Whether it could give a row's text away: on forget rows it then stays in the run's private folder."""


def _nll(module: torch.nn.Module, batch: Mapping[str, Any], _: int | None) -> torch.Tensor:
    found = answers(module, batch)
    return row_sums(token_nll(found.logits_tv.float(), found.labels_t).double(), found.rows_t, found.rows)


def _logits(module: torch.nn.Module, batch: Mapping[str, Any], _: int | None) -> torch.Tensor:
    return answers(module, batch).logits_tv.float().log_softmax(1)


def _activations(module: torch.nn.Module, batch: Mapping[str, Any], layer: int | None) -> torch.Tensor:
    chosen = chosen_layer(layer, len(decoder_layers(module)))
    return layer_output(module, batch, chosen)[batch["labels"] != IGNORED].float()


QUANTITIES: dict[str, Quantity] = {}


def register(quantity: Quantity) -> None:
    """Add a quantity; a name is taken once."""
    assert quantity.name not in QUANTITIES, f"the quantity {quantity.name} is declared twice"
    QUANTITIES[quantity.name] = quantity


register(Quantity("nll", "reference_nll", _nll, per="row", dtype="float64", tells=False))
register(Quantity("logits", "reference_logprobs", _logits, shape=lambda config: (config.vocab_size,)))
register(
    Quantity(
        "activations", "reference_activations", _activations, shape=lambda config: (config.hidden_size,), head=False
    )
)
