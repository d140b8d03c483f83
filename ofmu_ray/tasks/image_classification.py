"""Image classifiers of transformers: an image in, one of a fixed number of classes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    import torch

    from ofmu_ray.config import DataConfig, ExportConfig, ModelConfig, TrainConfig, TrainDataConfig, UnlearnConfig
    from ofmu_ray.data.image_encoder import ImageEncoder
    from ofmu_ray.data.image_reading import ImageReading
    from ofmu_ray.data.stored_stream import TokenisedStream
    from ofmu_ray.evaluation.image_evaluator import ImageEvaluator
    from ofmu_ray.models.classifiers import ImageProcessor
    from ofmu_ray.models.weights import Weights
    from ofmu_ray.storage import NewFolder, PathLike


class ImageClassification:
    """AutoModelForImageClassification; the class is an answer of one token, so losses over answers apply."""

    offers = frozenset({"answers", "classes"})
    rows = "images"
    pipeline_tag = "image-classification"

    def check_early(self, config: ModelConfig, option: str, layers: Mapping[str, int]) -> None:
        from ofmu_ray.models.checks import check_place

        check_place(config.path, option)

    def check_model(self, config: ModelConfig, option: str = "model.path") -> ImageProcessor:
        from ofmu_ray.models.checks import check_stored_model
        from ofmu_ray.models.classifiers import ImageProcessor

        if config.lora is not None:
            raise UserError("model.lora: image classifiers are trained without adapters; drop the option")
        check_stored_model(config, option)
        return ImageProcessor.read(config.path, option, trust_remote_code=config.trust_remote_code)

    def skeleton(self, config: ModelConfig) -> torch.nn.Module | None:
        from ofmu_ray.models.classifiers import empty_classifier

        return None if config.trust_remote_code else empty_classifier(config)

    def encoder(self, processor: ImageProcessor, data: DataConfig | TrainDataConfig) -> ImageEncoder:
        from ofmu_ray.data.image_encoder import ImageEncoder

        shape = {"size": processor.size, "channels": processor.channels}
        encoder = ImageEncoder(data.images, **shape, classes=processor.classes)
        if data.split is not None:
            encoder.check_split(data.split.classes)
        return encoder

    def evaluation(self, config: UnlearnConfig, storage: PathLike) -> ImageEvaluator:
        from ofmu_ray.evaluation.image_evaluator import ImageEvaluator

        return ImageEvaluator.of(config, self.encoder(self.check_model(config.model), config.data), storage)

    def initial(self, folder: str, config: TrainConfig) -> None:
        """Write the model that `ofmu train` starts from without `model`."""
        from ofmu_ray.models.classifiers import write_initial_classifier

        write_initial_classifier(folder, config)

    def reading(
        self,
        streams: Mapping[str, TokenisedStream],
        encoder: ImageEncoder,
        data: DataConfig | TrainDataConfig,
        seed: int,
    ) -> ImageReading:
        """Adds the augmented pixels to a plan's rows as they are read."""
        from ofmu_ray.data.image_reading import ImageReading, pixel_table

        tables = {name: pixel_table(stream, encoder.shape) for name, stream in streams.items()}
        return ImageReading(tables, data.images.padding, data.images.flip, seed)

    def load(self, config: ModelConfig) -> tuple[torch.nn.Module, ImageProcessor]:
        from ofmu_ray.models.classifiers import load_classifier

        return load_classifier(config)

    def normalisation(self, module: torch.nn.Module, *, unlearns: bool, workers: int) -> None:
        """Batch normalisation by fixed statistics, or, in training, by those of all workers' rows."""
        from ofmu_ray.models.batch_norm import fix_statistics, share_statistics

        if unlearns:
            fix_statistics(module)
        elif workers > 1:
            share_statistics(module)

    def copy(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        from ofmu_ray.models.classifiers import copied_classifier

        return copied_classifier(module, weights)

    def collate(self, processor: ImageProcessor) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
        return processor.collate

    def loss(self, module: torch.nn.Module, micro: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy."""
        from ofmu_ray.models.answers import causal_lm_loss

        return causal_lm_loss(module, micro)

    def utility(self, module: torch.nn.Module, micro: Any) -> torch.Tensor:
        """Probability of the true class."""
        from ofmu_ray.models.answers import answers

        logits, labels, _, _ = answers(module, micro)
        return logits.double().softmax(1).gather(1, labels[:, None])[:, 0].cpu()

    def export(
        self,
        module: torch.nn.Module,
        processor: ImageProcessor,
        weights: Weights,
        folder: NewFolder | None,
        model: ModelConfig,
        options: ExportConfig,
    ) -> None:
        from ofmu_ray.models.classifiers import export_classifier

        export_classifier(module, processor, weights, folder, options.dtype)

    def exported_as_is(self, module: torch.nn.Module, model: ModelConfig, options: ExportConfig) -> bool:
        return options.dtype == "auto" and model.precision != "bf16"


TASK = ImageClassification()
