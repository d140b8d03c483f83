"""Causal language models on questions with answers, documents or chats: the built-in task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofmu_ray.progress import note
from ofmu_ray.tasks.protocol import Task

if TYPE_CHECKING:
    import torch

    from ofmu_ray.config import DataConfig, ExportConfig, ModelConfig, TrainConfig, TrainDataConfig, UnlearnConfig
    from ofmu_ray.config.evaluate import EvaluateConfig
    from ofmu_ray.data.kinds import StreamEncoders
    from ofmu_ray.evaluation.evaluator import Evaluator
    from ofmu_ray.models.unread import UnreadWeights
    from ofmu_ray.models.weights import Weights
    from ofmu_ray.storage import NewFolder, PathLike


class CausalLM:
    """Models of transformers. The tokens of answers (of documents, of the assistant's turns) have a loss."""

    offers = frozenset({"answers", "texts"})
    rows = "texts"
    pipeline_tag = "text-generation"

    def check_early(self, config: ModelConfig, option: str, layers: Mapping[str, int]) -> None:
        from ofmu_ray.assets import resolve_builtin
        from ofmu_ray.models.causal import check_folder
        from ofmu_ray.models.checks import check_place
        from ofmu_ray.models.stored_names import check_names

        check_place(config.path, option)
        check_folder(Path(resolve_builtin(config.path)), option)
        check_names(config, layers)

    def check_model(self, config: ModelConfig, option: str = "model.path") -> Any:
        from ofmu_ray.models.checks import check_model

        return check_model(config, option)

    def check_rows(self, config: ModelConfig, longest: Mapping[str, int], largest: Mapping[str, int]) -> None:
        from ofmu_ray.models.checks import check_rows

        check_rows(config, longest, largest)

    def skeleton(self, config: ModelConfig) -> torch.nn.Module | None:
        from ofmu_ray.models.causal import attention_of, check_trainable
        from ofmu_ray.models.loading import empty_model, read_config

        if config.trust_remote_code:
            return None
        shape = read_config(config.path)
        check_trainable(shape, config)
        if config.attention == "sdpa" and attention_of(shape, config) == "eager":
            note("model", f"{type(shape).__name__[:-6]} has no sdpa attention; eager is used instead")
        return empty_model(shape, config)

    def encoder(self, processor: Any, data: DataConfig | TrainDataConfig) -> StreamEncoders:
        from ofmu_ray.data.kinds import StreamEncoders

        return StreamEncoders.of(processor, data.format, {name: data.kind(name) for name in data.sources})

    def evaluation(self, config: UnlearnConfig, storage: PathLike) -> Evaluator:
        from ofmu_ray.evaluation.evaluator import Evaluator

        return Evaluator.of(config, storage)

    def comparison(self, config: EvaluateConfig, storage: PathLike) -> Evaluator:
        """The evaluation of many models, each with its own tokenizer."""
        from ofmu_ray.evaluation.evaluator import Evaluator

        return Evaluator.of_many(config, storage)

    def initial(self, folder: str, config: TrainConfig) -> None:
        """A Llama from the scratch options with seeded random weights."""
        from ofmu_ray.models.initial import write_initial_model

        write_initial_model(folder, config)

    def load(self, config: ModelConfig) -> tuple[torch.nn.Module, Any]:
        from ofmu_ray.models.loading import load_causal_lm

        return load_causal_lm(config)

    def remarks(self, config: ModelConfig) -> list[str]:
        """What of the model's options this process cannot do."""
        from ofmu_ray.models.causal import flash_note
        from ofmu_ray.models.loading import read_config

        remark = flash_note(read_config(config.path, trust_remote_code=config.trust_remote_code), config)
        return [remark] if remark else []

    def load_unread(self, config: ModelConfig) -> tuple[torch.nn.Module, Any, UnreadWeights] | str:
        """`load` without reading the weights, or why this model has to be loaded whole."""
        from ofmu_ray.models.loading import load_tokenizer
        from ofmu_ray.models.unread import load_unread

        result = load_unread(config)
        return result if isinstance(result, str) else (result[0], load_tokenizer(config), result[1])

    def copy(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        from ofmu_ray.models.loading import copy_with

        return copy_with(module, weights)

    def collate(self, processor: Any) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
        from ofmu_ray.data.batches import padded

        return padded(processor.pad_token_id)

    def loss(self, module: torch.nn.Module, micro: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of the answers' tokens."""
        from ofmu_ray.models.answers import causal_lm_loss

        return causal_lm_loss(module, micro)

    def utility(self, module: torch.nn.Module, micro: Any) -> torch.Tensor:
        """exp(-mean token NLL of the answer), EOS included."""
        import torch
        from torch.nn import functional

        from ofmu_ray.models.answers import answers

        predictions = answers(module, micro)
        nll = functional.cross_entropy(predictions.logits_tv.float(), predictions.labels_t, reduction="none").double()
        sums = torch.zeros(predictions.rows, dtype=torch.float64, device=nll.device)
        sums = sums.index_add(0, predictions.rows_t, nll)
        tokens = torch.bincount(predictions.rows_t, minlength=predictions.rows)
        return torch.exp(-sums / tokens).cpu()

    def export(
        self,
        module: torch.nn.Module,
        processor: Any,
        weights: Weights,
        folder: NewFolder | None,
        model: ModelConfig,
        options: ExportConfig,
    ) -> None:
        from ofmu_ray.models.exporting import export_causal_lm

        export_causal_lm(module, processor, weights, folder, model, options)

    def round_as_exported(self, module: torch.nn.Module, model: ModelConfig, options: ExportConfig) -> None:
        from ofmu_ray.models.exporting import round_as_exported

        round_as_exported(module, model, options)

    def exported_as_is(self, module: torch.nn.Module, model: ModelConfig, options: ExportConfig) -> bool:
        from ofmu_ray.models.exporting import exported_as_is

        return exported_as_is(module, model, options)


TASK: Task = CausalLM()
