"""Image classifiers: loading, pixels as their input, export, and ResNets for small images.

The class of an image is an answer of one token from a vocabulary of classes, so every loss over answers has its
classification form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from ofmu_ray.config import ModelConfig, TrainConfig
from ofmu_ray.data.batch import IGNORED
from ofmu_ray.data.image_files import stacked
from ofmu_ray.errors import UserError
from ofmu_ray.models.answers import unwrapped
from ofmu_ray.models.loading import does_not_load, quiet, read_config, ready
from ofmu_ray.models.source import model_source
from ofmu_ray.storage import PathLike, atomic_dir

if TYPE_CHECKING:
    from ofmu_ray.models.weights import Weights
    from ofmu_ray.storage import NewFolder

PROCESSOR = "preprocessor_config.json"
KIND = "an image classifier"
_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_LAYERS = {
    "resnet8": ([16, 32, 64], [1, 1, 1]),
    "resnet20": ([16, 32, 64], [3, 3, 3]),
    "resnet18": ([64, 128, 256, 512], [2, 2, 2, 2]),
}


@dataclass(frozen=True)
class ImageProcessor:
    """How pixels become a model's input, from its preprocessor_config.json."""

    size: int
    """Side of the input."""
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str
    """How stored images of another size are scaled: torch's name."""
    classes: tuple[str, ...]
    """Names, in the order of their numbers."""
    settings: Mapping[str, Any]
    """The file's content."""

    @classmethod
    def read(cls, path: str, option: str = "model.path", *, trust_remote_code: bool = False) -> ImageProcessor:
        """That of a model, with the classes in its config.json.

        Raises:
            UserError: the model is no image classifier, or its processor has no input size.
        """
        shape = read_config(path, option, trust_remote_code=trust_remote_code)
        names = list(shape.architectures or ())
        if not any("ImageClassification" in name for name in names):
            what = ", ".join(names) or type(shape).__name__
            raise UserError(
                f"{option} = {path!r}: {what} is not an image classifier; give one that "
                "AutoModelForImageClassification loads with its head, such as ResNet or ViT"
            )
        settings = _settings(path, option)
        size = settings.get("size") or getattr(shape, "image_size", None)
        if isinstance(size, Mapping):
            size = size.get("height") or size.get("shortest_edge")
        if not isinstance(size, int):
            raise UserError(f"{option} = {path!r}: {PROCESSOR} has no size with a height or shortest_edge")
        channels = int(getattr(shape, "num_channels", 3))
        normalise = settings.get("do_normalize", True)
        return cls(
            size=size,
            channels=channels,
            mean=tuple(settings.get("image_mean") or [0.5]) if normalise else (0.0,),
            std=tuple(settings.get("image_std") or [0.5]) if normalise else (1.0,),
            resample=_MODES.get(settings.get("resample", 2), "bilinear"),
            classes=tuple(str(shape.id2label[number]) for number in range(shape.num_labels)),
            settings=settings,
        )

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [rows, height, width, channels] -> model input: fp32 [rows, channels, size, size], channels last."""
        mean, std = (torch.tensor(values, device=pixels.device) for values in (self.mean, self.std))
        values = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        if values.shape[-1] != self.size:
            aligned = {} if self.resample == "nearest" else {"align_corners": False, "antialias": True}
            values = functional.interpolate(values, size=(self.size, self.size), mode=self.resample, **aligned)  # type: ignore[arg-type]
        # convolutions and normalisation keep their input's layout; channels last takes a third less time
        return values.contiguous(memory_format=torch.channels_last)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of `pixels` and `label` as a micro-batch: pixels uint8 [rows, height, width, channels] and labels int64
        [rows, 2], whose first column stands for the image and has no loss."""
        side = int((len(rows[0]["image_pixels"]) // self.channels) ** 0.5)
        pixels = stacked([row["image_pixels"] for row in rows], (side, side, self.channels))
        labels = torch.tensor([[IGNORED, int(row["label"])] for row in rows])
        return {"pixels": torch.from_numpy(pixels.copy()), "labels": labels}


def _settings(path: str, option: str) -> dict[str, Any]:
    folder = Path(model_source(path, option))
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        with does_not_load(path, option, KIND):
            folder = Path(hf_hub_download(path, PROCESSOR)).parent
    if not (folder / PROCESSOR).is_file():
        raise UserError(f"{option} = {path!r} has no {PROCESSOR}: save the model's image processor there")
    content: dict[str, Any] = json.loads((folder / PROCESSOR).read_text())
    return content


def load_classifier(config: ModelConfig) -> tuple[torch.nn.Module, ImageProcessor]:
    """The model, ready for an engine as by `loading.load_causal_lm`, and its processor.

    Raises:
        UserError: it does not load, or is no image classifier.
    """
    import transformers

    processor = ImageProcessor.read(config.path, trust_remote_code=config.trust_remote_code)
    with does_not_load(config.path, "model.path", KIND), quiet():
        module = transformers.AutoModelForImageClassification.from_pretrained(
            model_source(config.path),
            use_safetensors=True,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            trust_remote_code=config.trust_remote_code,
        )
    module.image_processor = processor
    return ready(module, config), processor


def empty_classifier(config: ModelConfig) -> torch.nn.Module:
    """The same model without weights, on the meta device."""
    import transformers

    shape = read_config(config.path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        return ready(transformers.AutoModelForImageClassification.from_config(shape), config)


def copied_classifier(module: Any, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A model like the module with these weights, in eval mode."""
    import transformers

    base = unwrapped(module)
    with torch.random.fork_rng(), next(module.parameters()).device:
        model: Any = transformers.AutoModelForImageClassification.from_config(base.config)
    model.load_state_dict(weights)
    model.image_processor = base.image_processor
    copied: torch.nn.Module = model.eval()
    return copied


def class_logits(module: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits of a micro-batch, at least fp32 [rows, classes]."""
    inner = unwrapped(module)
    values = inner.image_processor.normalised(batch["pixels"])
    dtype = next(inner.parameters()).dtype
    logits: torch.Tensor = module(pixel_values=values.to(dtype) if dtype.is_floating_point else values).logits
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


@torch.inference_mode()
def predictions(module: Any, processor: ImageProcessor, pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """Class probabilities of images without augmentation, fp32 [images, classes]. The model must be in eval mode."""
    device = next(module.parameters()).device
    pieces = []
    for start in range(0, len(pixels), batch_size):
        batch = torch.from_numpy(np.array(pixels[start : start + batch_size])).to(device)
        logits = module(pixel_values=processor.normalised(batch).to(next(module.parameters()).dtype)).logits
        pieces.append(logits.float().softmax(1).cpu().numpy())
    return np.concatenate(pieces)


def export_classifier(
    module: Any, processor: ImageProcessor, weights: Weights, folder: NewFolder | None, dtype: str
) -> None:
    """Fill `folder` with what AutoModelForImageClassification loads; None on ranks other than 0. Collective."""
    content = weights.whole()
    if folder is None or content is None:
        return
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype)
    if wanted is not None:
        content = {n: value.to(wanted) if value.is_floating_point() else value for n, value in content.items()}
    with quiet():
        unwrapped(module).save_pretrained(folder.path, state_dict=content)
    (folder.path / PROCESSOR).write_text(json.dumps(dict(processor.settings), indent=2) + "\n")


def write_initial_classifier(folder: PathLike, config: TrainConfig) -> None:
    """Write a ResNet with seeded random weights as a Hugging Face directory.

    transformers' stem shrinks images fourfold (a 7 x 7 convolution and a pooling, each with stride 2). The processor
    enlarges them first, so that the first stage sees small images at full size and the model is still an ordinary
    ResNetConfig.
    """
    import transformers

    options = config.classifier
    widths, depths = _LAYERS[options.architecture]
    shape = transformers.ResNetConfig(
        num_channels=options.channels,
        embedding_size=widths[0],
        hidden_sizes=widths,
        depths=depths,
        layer_type="basic",
        num_labels=len(options.classes),
        id2label=dict(enumerate(options.classes)),
        label2id={name: number for number, name in enumerate(options.classes)},
    )
    torch.manual_seed(config.seed)
    model = transformers.ResNetForImageClassification(shape)
    side = options.image_size * options.enlarge
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 0,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(options.mean) * (options.channels // len(options.mean)),
        "image_std": list(options.std) * (options.channels // len(options.std)),
    }
    with atomic_dir(folder) as staging, quiet():
        model.save_pretrained(staging)
        (staging / PROCESSOR).write_text(json.dumps(settings, indent=2) + "\n")
