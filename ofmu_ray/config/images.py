"""Options of image classification: columns, sizes, augmentation, forget sets within one source, models from scratch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ofmu_ray.config.ranges import not_negative, positive, require


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How a row becomes an image and its class (task image_classification)."""

    image: str = "image"
    """Column of the encoded image: bytes, or {bytes, path} as in hub data sets."""
    label: str = "label"
    """Column of the class: its number from 0, or its name in the model's config.json."""
    size: int | None = None
    """Side of the stored images (pixels), which crops act on; the model's input size is reached by scaling them. null:
    the model's input size."""
    padding: int = 4
    """Random crops of images padded by this many black pixels on each side, in training only; 0: none."""
    flip: bool = True
    """Flip half of the images horizontally, in training only."""

    def __post_init__(self) -> None:
        positive("data.images", self, "size")
        not_negative("data.images", self, "padding")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Forget and retain rows as two parts of one source, chosen by row number or class; no file is copied."""

    share: float | None = None
    """Random forgetting: share of the rows (0 to 1), by a hash of seed and row number."""
    classes: list[int | str] = field(default_factory=list)
    """Class-wise forgetting: all rows whose label is one of these."""
    seed: int = 0
    """Decides which rows `share` takes."""

    def check(self) -> None:
        """Checks that it says which rows. The owner calls it: a default value says nothing."""
        one = (self.share is None) == bool(self.classes)
        require(one, "data.split", f"share {self.share}, classes {self.classes}", "either a share or classes")
        if self.share is not None:
            require(0 < self.share < 1, "data.split.share", self.share, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A ResNet for small images, trained from scratch (`ofmu train`, task image_classification)."""

    architecture: Literal["resnet8", "resnet20", "resnet18"] = "resnet20"
    """resnet8 and resnet20: 6 n + 2 layers of 16, 32 and 64 channels; resnet18: 64 to 512 channels."""
    classes: list[str] = field(default_factory=lambda: [str(number) for number in range(10)])
    """Names of the classes, in the order of their numbers."""
    channels: Literal[1, 3] = 3
    """1: grey images; 3: RGB."""
    image_size: int = 32
    """Side of the images (pixels)."""
    enlarge: int = 4
    """Factor by which images are enlarged for the stem, which then shrinks them fourfold: at 4 the first stage sees
    them at full size; 2 and 1 save three quarters and more of the work, and cost accuracy."""
    mean: list[float] = field(default_factory=lambda: [0.5])
    """Mean of the pixels (0 to 1), one for all channels or one each."""
    std: list[float] = field(default_factory=lambda: [0.25])
    """Standard deviation of the pixels, as `mean`."""

    def __post_init__(self) -> None:
        positive("classifier", self, "image_size", "enlarge")
        names = len(set(self.classes)) == len(self.classes) > 1
        require(names, "classifier.classes", self.classes, "two or more different names")
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(len(values) in (1, self.channels), f"classifier.{name}", values, "one number, or one per channel")
        require(
            all(0 <= value <= 1 for value in self.mean), "classifier.mean", self.mean, "from 0 (black) to 1 (white)"
        )
        require(all(0 < value <= 1 for value in self.std), "classifier.std", self.std, "greater than 0, at most 1")
