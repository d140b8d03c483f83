"""Methods on image classifiers against a plain loop of torch: one round on a tiny ResNet, in float64."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from ofmu_ray.config import METHODS, ModelConfig, OptimizerConfig
from ofmu_ray.engines import Batch, TorchEngine
from ofmu_ray.features.label_features import NearestClass
from ofmu_ray.features.reference import ReferenceModel
from ofmu_ray.features.saliency import GradientMask
from ofmu_ray.methods import build_method
from ofmu_ray.models.batch_norm import fix_statistics
from ofmu_ray.models.classifiers import ImageProcessor
from ofmu_ray.tasks.image_classification import TASK

RATE, CLASSES = 0.05, 4
SGD = OptimizerConfig(name="sgd", lr=RATE, clip=None)
PROCESSOR = ImageProcessor(
    size=16, channels=3, mean=(0.5,), std=(0.25,), resample="nearest", classes=tuple("abcd"), settings={}
)


def classifier() -> Any:
    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
    module: Any = ResNetForImageClassification(shape).double().train()
    with torch.no_grad():
        for _ in range(20):  # running statistics of real inputs
            module(pixel_values=torch.randn(32, 3, 16, 16, dtype=torch.float64))
    module.image_processor = PROCESSOR
    fix_statistics(module)
    return module


def micro(seed: int, rows: int = 12) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, 8, 8, 3), generator=drawn, dtype=torch.uint8)
    classes = torch.randint(0, CLASSES, (rows, 2), generator=drawn)
    labels = torch.stack([torch.full((rows,), -100), classes[:, 0]], 1)
    return {
        "pixels": pixels,
        "labels": labels,
        "other_labels": classes[:, 1],
        "reference_nll": torch.rand(rows).double(),
    }


FORGET, RETAIN = micro(1), micro(2)


def logits(module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The classifier in evaluation mode, on pixels enlarged by hand."""
    values = (batch["pixels"].double() / 255 - 0.5) / 0.25
    wide = values.permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return module.eval()(pixel_values=wide.float().double()).logits


def nll(module: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor | None = None) -> torch.Tensor:
    labels = batch["labels"][:, 1] if labels is None else labels
    return -logits(module, batch).log_softmax(1)[range(len(labels)), labels]


def stepped(name: str, **options: Any) -> tuple[Any, Any]:
    """The model after one round of a method on one batch in two micro-batches, and its engine."""
    module = classifier()
    config = METHODS[name](optimizer=SGD, **options)
    method: Any = build_method(config, 1)
    engine = TorchEngine(module, TASK.loss, outer=SGD)
    method.start(engine)
    if name == "salun":
        method.given("gradient_mask", engine, expected_mask(options["share"]))
    halves = [[{key: value[part] for key, value in batch.items()} for part in (slice(0, 5), slice(5, 12))]
              for batch in (FORGET, RETAIN)]  # fmt: skip
    method.round(engine, [Batch(halves[0])], [Batch(halves[1])])
    return module, engine


def expected_mask(share: float) -> dict[str, torch.Tensor]:
    module = classifier()
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(nll(module, FORGET).sum(), list(parameters.values()))
    bound = torch.cat([gradient.abs().flatten() for gradient in gradients]).quantile(1 - share)
    return {name: (gradient.abs() > bound).double() for name, gradient in zip(parameters, gradients, strict=True)}


def by_hand(name: str) -> dict[str, torch.Tensor]:
    module = classifier()
    parameters = dict(module.named_parameters())
    other = FORGET["other_labels"]
    forget = {
        "random_labels": lambda: nll(module, FORGET, other).mean(),
        "salun": lambda: nll(module, FORGET, other).mean(),
        "gradient_ascent": lambda: -nll(module, FORGET).mean(),
        "npo": lambda: (2 / 0.5 * (1 + (FORGET["reference_nll"] - nll(module, FORGET)).exp() ** 0.5).log()).mean(),
        "l1_sparse": lambda: torch.zeros(()),
    }[name]()
    retain = 0.0 if name == "gradient_ascent" else nll(module, RETAIN).mean()
    if name == "l1_sparse":
        retain = retain + 0.3 * sum(parameter.abs().sum() for parameter in parameters.values())
    gradients = torch.autograd.grad(forget + retain, list(parameters.values()))
    mask = expected_mask(0.4) if name == "salun" else dict.fromkeys(parameters, 1.0)
    return {
        key: parameter.detach() - RATE * mask[key] * gradient
        for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random_labels", {}),
        ("salun", {"share": 0.4}),
        ("gradient_ascent", {}),
        ("npo", {"beta": 0.5}),
        ("l1_sparse", {"alpha": 0.3}),
    ],
)
def test_a_round_is_the_written_step(name: str, options: dict[str, Any]) -> None:
    before = copy.deepcopy(classifier().state_dict())
    module, engine = stepped(name, **options)
    expected = by_hand(name)
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[key], rtol=1e-5, atol=1e-7, msg=key)
    for key, value in module.state_dict().items():
        if "running" in key or "tracked" in key:
            assert torch.equal(value, before[key]), key
    assert engine.account.gradient_passes == {
        "forget": int(name != "l1_sparse"), "retain": int(name != "gradient_ascent"),
    }  # fmt: skip


class Reference:
    """What features use of the reference model."""

    module = classifier()
    loss = staticmethod(TASK.loss)

    @staticmethod
    def collated(rows: Any) -> dict[str, torch.Tensor]:
        return {key: value[[row["row"] for row in rows]] for key, value in FORGET.items()}


def test_the_mask_is_that_of_the_largest_gradients() -> None:
    rows = [{"row": row} for row in range(12)]
    found = GradientMask(0.4).compute(Reference, rows)  # type: ignore[arg-type]
    expected = expected_mask(0.4)
    assert found.keys() == expected.keys()
    differing = sum(int((found[name].double() != expected[name]).sum()) for name in found)
    assert differing <= 2  # at the bound
    assert all(mask.unique().tolist() in ([0.0], [1.0], [0.0, 1.0]) for mask in found.values())


def test_the_masks_share_is_one_of_the_weights_that_are_trained(tmp_path: Path) -> None:
    """model.freeze took its part of the share before."""
    folder, chosen = tmp_path / "model", types.SimpleNamespace(rows=[], key="rows")
    classifier().float().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 16, "width": 16}}')
    for freeze in (["^resnet"], []):
        model = ModelConfig(path=str(folder), freeze=freeze)
        reference = ReferenceModel(model, str(tmp_path), str(tmp_path / "private"), "salun", "image_classification")
        mask = load_file(reference.parameters(GradientMask(0.5), chosen))  # type: ignore[arg-type]
        assert all(name.startswith("classifier") for name in mask) == bool(freeze)
        ones, numel = (sum(int(each(part)) for part in mask.values()) for each in (torch.sum, torch.numel))
        assert ones == round(0.5 * numel)


def test_the_nearest_class_is_a_wrong_one_and_the_likeliest_after_the_step() -> None:
    module = classifier().float()
    nearest = NearestClass(0.2).measure(module, FORGET)
    labels = FORGET["labels"][:, 1]
    assert not (nearest == labels).any()
    images = PROCESSOR.normalised(FORGET["pixels"]).requires_grad_(True)
    functional.cross_entropy(module(pixel_values=images).logits, labels).backward()
    assert images.grad is not None
    shifted = module(pixel_values=images.detach() + 0.2 * images.grad.sign()).logits
    for row, label in enumerate(labels.tolist()):
        others = [number for number in range(CLASSES) if number != label]
        assert int(nearest[row]) == max(others, key=lambda number, row=row: float(shifted[row, number]))
