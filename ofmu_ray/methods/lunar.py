"""LUNAR: activations of forget questions towards those of unanswerable ones (Shen et al. 2025, arXiv 2502.07218)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ofmu_ray import progress
from ofmu_ray.config.methods import MYPY, RATE, RETAIN_WEIGHT, OneLoopConfig, Ranges
from ofmu_ray.config.ranges import not_negative
from ofmu_ray.data.batch import IGNORED
from ofmu_ray.errors import UserError
from ofmu_ray.features.protocol import FeatureContext, Need, ParameterValues, Row, Values
from ofmu_ray.methods.one_loop import OneLoop

if MYPY:
    import torch

    from ofmu_ray.algorithm.losses import LossParts
    from ofmu_ray.config import UnlearnConfig
    from ofmu_ray.data.prepare import PreparedData
    from ofmu_ray.engines.protocol import Engine
    from ofmu_ray.features.reference import Reference

BUILTIN = "builtin:unanswerable.jsonl"
ROWS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class LUNARConfig(OneLoopConfig):
    """Activation redirection (Shen et al. 2025, arXiv 2502.07218): forget questions like unanswerable ones."""

    forget_weight: float = 1.0
    """gamma, weight of the forget loss."""
    retain_weight: float = 1.0
    """alpha, weight of the distance to the reference model's activations at retain questions."""
    layer: int | None = None
    """Layer whose MLP's last projection is trained, from 0; null: 7, or the middle layer of a model with fewer than 8
    (the authors choose by generations: 22 of 32)."""
    coefficient: float = 2.0
    """c, how far along the direction."""
    unanswerable: str | None = None
    """JSON Lines with a column `question`, questions that the model declines to answer; null: the built-in list."""

    def check(self, section: str) -> None:
        super().check(section)
        not_negative(section, self, "forget_weight", "retain_weight", "layer")

    def check_run(self, config: UnlearnConfig) -> None:
        if config.model.lora is not None:
            raise UserError("method = lunar trains a projection of the model itself: drop model.lora")
        for stream in ("forget", "retain"):
            if config.data.kind(stream) == "text":
                raise UserError(
                    f"method = lunar redirects questions, but data.{stream} has texts (data.format.kind: text): choose "
                    "another method"
                )


def prompt_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    """bool [rows, positions]: the tokens before each row's answer."""
    mask: torch.Tensor = (batch["labels"] != IGNORED).long().cumsum(1) == 0
    return mask


@dataclass(frozen=True)
class PromptActivations(Values):
    """Output of a decoder layer at the prompt's tokens."""

    name = "prompt_activations"
    key = "reference_prompt_activations"
    in_step = True
    layer: int | None = None
    """From 0; None: engines.layers.chosen_layer."""

    def shape(self, config: Any) -> tuple[int, ...]:
        return (config.hidden_size,)

    def width(self, config: Any) -> int:
        return 1

    def entries(self, row: Row) -> int:
        return int(row["prompt_tokens"])

    def check(self, module: torch.nn.Module) -> None:
        from ofmu_ray.engines.layers import chosen_layer, decoder_layers

        chosen_layer(self.layer, len(decoder_layers(module)), "lunar.layer")

    def measure(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        from ofmu_ray.engines.layers import chosen_layer, decoder_layers, layer_output

        layer = chosen_layer(self.layer, len(decoder_layers(module)), "lunar.layer")
        return layer_output(module, batch, layer)[prompt_mask(batch)].float()


@dataclass(frozen=True)
class RefusalDirection(ParameterValues):
    """Mean activation at the last token of unanswerable questions, minus that of the forget questions: {direction}."""

    name = "refusal_direction"
    in_step = True
    layer: int | None = None
    path: str | None = None
    prompts: tuple[tuple[int, ...], ...] = ()
    """The tokens of the unanswerable questions."""

    def resolved(self, settings: FeatureContext, prepared: PreparedData) -> RefusalDirection:
        from ofmu_ray.features.refusals import read_texts

        questions = read_texts(self.path or BUILTIN, settings.root, f"{settings.method}.unanswerable", "question")
        return replace(self, prompts=tuple(tuple(prepared.template.encode_prompt(text)) for text in questions))

    def compute(self, reference: Reference, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        forget = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
        return {"direction": (self._mean(reference, self.prompts) - self._mean(reference, forget)).float()}

    def _mean(self, reference: Reference, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        import torch

        from ofmu_ray.engines.layers import chosen_layer, decoder_layers, layer_output

        layer, sums = chosen_layer(self.layer, len(decoder_layers(reference.module)), "lunar.layer"), []
        with progress.bar("refusal direction", len(prompts), "row") as bar:
            for start in range(0, len(prompts), ROWS_AT_ONCE):
                chosen = prompts[start : start + ROWS_AT_ONCE]
                batch = reference.collated([{"input_ids": list(ids), "prompt_tokens": len(ids)} for ids in chosen])
                last = batch["attention_mask"].sum(1) - 1
                with torch.no_grad():
                    hidden_rtd = layer_output(reference.module, batch, layer)
                sums.append(hidden_rtd[torch.arange(len(chosen), device=last.device), last].double().sum(0).cpu())
                bar.update(len(chosen))
        return torch.stack(sums).sum(0) / len(prompts)


class LUNAR(OneLoop[LUNARConfig]):
    """Minimises gamma |h - (h_ref + c r)|^2 on forget questions + alpha |h - h_ref|^2 on retain questions.

    h is the output of one layer at all of a question's tokens, h_ref that of the reference model (stored: no second
    model), r the refusal direction. Only the last projection of the layer's MLP is trained. Mean over rows of the mean
    over tokens. (The authors fit that projection alone, to stored inputs.)
    """

    name = "lunar"
    options = LUNARConfig
    space: ClassVar[Ranges] = {
        "optimizer.lr": RATE,
        "coefficient": ("loguniform(0.5, 8)", "two octaves around the authors' 2"),
        "retain_weight": RETAIN_WEIGHT,
    }

    def __init__(self, config: LUNARConfig, rounds: int | None = None):
        import torch

        super().__init__(config, rounds)
        self.forget_weight, self.retain_weight = config.forget_weight, config.retain_weight
        self.layer = 0
        self.shift = torch.zeros(1)

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"texts"})

    @property
    def needs(self) -> tuple[Need, ...]:
        forget: list[Values | ParameterValues] = [
            PromptActivations(self.config.layer), RefusalDirection(self.config.layer, self.config.unanswerable),
        ]  # fmt: skip
        needs = tuple(Need("forget", feature) for feature in forget) if self.forget_weight > 0 else ()
        return (*needs, *((Need("retain", forget[0]),) if self.retain_weight > 0 else ()))

    def freeze(self, module: torch.nn.Module) -> None:
        """All but the last matrix of the layer: its MLP's output projection.

        Raises UserError when the model has no such layer.
        """
        from ofmu_ray.engines.layers import chosen_layer, decoder_layers, parameters_up_to

        layers = decoder_layers(module)
        self.layer = chosen_layer(self.config.layer, len(layers), "lunar.layer")
        used = parameters_up_to(module, self.layer)
        self.work = sum(p.numel() for p in used) / sum(p.numel() for p in module.parameters())
        kept = [parameter for parameter in layers[self.layer].parameters() if parameter.dim() == 2][-1]
        for parameter in module.parameters():
            if parameter is not kept:
                parameter.requires_grad_(False)

    def given(self, name: str, engine: Engine, parameters: Mapping[str, torch.Tensor]) -> None:
        """The refusal direction, computed before the run."""
        self.shift = self.config.coefficient * parameters["direction"]

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        target = micro["reference_prompt_activations"]
        return self._distance(module, micro, target + self.shift.to(target.device, target.dtype))

    def retain_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> LossParts:
        return self._distance(module, micro, micro["reference_prompt_activations"])

    def _distance(self, module: torch.nn.Module, micro: Mapping[str, Any], target: torch.Tensor) -> LossParts:
        import torch

        from ofmu_ray.algorithm.reference_losses import misdirection
        from ofmu_ray.engines.layers import layer_output

        asked = prompt_mask(micro)
        hidden_td = layer_output(module, micro, self.layer)[asked]
        hidden_td = hidden_td.float() if hidden_td.dtype in (torch.bfloat16, torch.float16) else hidden_td
        return misdirection(hidden_td, target.to(hidden_td.device), asked.nonzero()[:, 0], len(asked))
