"""The features that the built-in methods need. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ofmu_ray.data.batch import IGNORED, REFUSAL
from ofmu_ray.features.protocol import FeatureContext, Reader, Row, Tokens, Values, vocabulary

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ofmu_ray.data.template import Template
    from ofmu_ray.features.reference import Reference


@dataclass(frozen=True)
class AnswerNLL(Values):
    """Sum of the token losses of a row's answer (nats)."""

    name = "nll"
    key = "reference_nll"
    per_token = False
    dtype = "float64"
    spells = False
    in_step = True

    def shape(self, config: Any) -> tuple[int, ...]:
        return ()

    def measure(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        from ofmu_ray.algorithm.losses import row_sums, token_nll
        from ofmu_ray.models.answers import answers

        logits_tv, labels_t, rows_t, rows = answers(module, batch)
        return row_sums(token_nll(logits_tv.float(), labels_t).double(), rows_t, rows)


@dataclass(frozen=True)
class LogProbabilities(Values):
    """Log-probabilities of all next tokens at the answer's tokens."""

    name = "logits"
    key = "reference_logprobs"
    in_step = True

    def shape(self, config: Any) -> tuple[int, ...]:
        return (vocabulary(config),)

    def measure(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        from ofmu_ray.models.answers import answers

        return answers(module, batch).logits_tv.float().log_softmax(1)


@dataclass(frozen=True)
class Activations(Values):
    """Output of a decoder layer at the answer's tokens."""

    name = "activations"
    key = "reference_activations"
    in_step = True
    layer: int | None = None
    """From 0; None: engines.layers.chosen_layer."""

    def shape(self, config: Any) -> tuple[int, ...]:
        return (config.hidden_size,)

    def width(self, config: Any) -> int:
        return 1

    def check(self, module: torch.nn.Module) -> None:
        from ofmu_ray.engines.layers import chosen_layer, decoder_layers

        chosen_layer(self.layer, len(decoder_layers(module)))

    def measure(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        from ofmu_ray.engines.layers import chosen_layer, decoder_layers, layer_output

        layer = chosen_layer(self.layer, len(decoder_layers(module)))
        return layer_output(module, batch, layer)[batch["labels"] != IGNORED].float()


NLL = AnswerNLL()
LOG_PROBABILITIES = LogProbabilities()


@dataclass(frozen=True)
class Refusals(Tokens):
    """A refusal to the row's question."""

    prefix = REFUSAL
    path: str | None = None
    """JSON Lines with a column `answer`; None: the built-in list."""
    texts: tuple[str, ...] = ()
    seed: int = 0

    def resolved(self, settings: FeatureContext) -> Refusals:
        from ofmu_ray.features.refusals import read_refusals

        texts = read_refusals(self.path, settings.root, f"{settings.method}.refusals")
        return replace(self, texts=tuple(texts), seed=settings.seed)

    def rows(self, model: Reader, rows: Sequence[Row], template: Template) -> list[dict[str, Any]]:
        from ofmu_ray.features.refusals import refusal_rows

        return refusal_rows(rows, self.texts, template, self.seed)


@dataclass(frozen=True)
class Alternatives(Tokens):
    """Answers sampled from the model itself, one per epoch."""

    prefix = REFUSAL
    reads_model = True
    alternatives: int
    """Per row."""
    temperature: float
    top_k: int
    max_new_tokens: int
    prompt: str | None = None
    """Prompt with {question} and {answer}; None: the question alone."""
    seed: int = 0

    @property
    def count(self) -> int:
        return self.alternatives

    def resolved(self, settings: FeatureContext) -> Alternatives:
        return replace(self, seed=settings.seed)

    def rows(self, model: Reader, rows: Sequence[Row], template: Template) -> list[dict[str, Any]]:
        import numpy as np

        from ofmu_ray.features.alternatives import alternative_prompts, answered

        prompts = alternative_prompts(rows, self.alternatives, self.prompt, template)
        lengths = np.array([len(row["input_ids"]) + self.max_new_tokens for row in prompts])
        wide = np.full(len(prompts), model.config.vocab_size)
        drawn = dict(model.read(self, prompts, lengths, wide, "alternatives"))
        return answered(rows, [drawn[number].tolist() for number in range(len(prompts))], template)

    def read(self, reference: Reference, rows: Sequence[Row]) -> list[np.ndarray]:
        """The tokens sampled after each row's prompt, int64."""
        import numpy as np

        from ofmu_ray.evaluation.generation import Sampling, generate_batch
        from ofmu_ray.models.answers import unwrapped

        names = [f"{self.seed}/{row['row_id']}" for row in rows]
        draws = Sampling.of(names, self.max_new_tokens, self.temperature, self.top_k)
        new = generate_batch(
            unwrapped(reference.module),
            [row["input_ids"] for row in rows],
            max_new_tokens=[self.max_new_tokens] * len(rows),
            stop=reference.stop,
            draws=draws,
        )
        return [np.array(ids, dtype=np.int64) for ids in new]
