"""Rows of an encoded image and a class as raw pixels and a number: the encoder of image classifiers."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ofmu_ray.config import ImagesConfig, close_match
from ofmu_ray.data.encoder import EncodedRow
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageEncoder:
    """Decodes, scales to the stored size, and numbers the classes: `pixels`, uint8 [size, size, channels], `label`.

    Raises:
        UserError: data.images.size is missing where it is needed.
    """

    task = "image_classification"

    def __init__(self, config: ImagesConfig, *, size: int, channels: int, classes: Sequence[str]) -> None:
        self.config, self.classes = config, tuple(classes)
        self.numbers = {name: number for number, name in enumerate(self.classes)}
        side = config.size or size
        self.shape = (side, side, channels)
        self.payload = pa.schema([("image_pixels", pa.binary(side * side * channels)), ("label", pa.int32())])

    @property
    def columns(self) -> tuple[str, str]:
        return self.config.image, self.config.label

    def fingerprint(self) -> str:
        code = files("ofmu_ray.data").joinpath("image_encoder.py").read_text()
        text = f"{self.shape} {self.classes} {self.config.image} {self.config.label} {code}"
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(
        self, rows: Sequence[tuple[str, Mapping[str, Any]]], problems: Problems
    ) -> Iterator[tuple[int, EncodedRow]]:
        for index, (place, cells) in enumerate(rows):
            missing = [name for name in self.columns if name not in cells]
            if missing:
                option = "image" if missing[0] == self.config.image else "label"
                known = ", ".join(sorted(map(str, cells)))
                problems.add(f"no column {missing[0]!r}, only {known}. Set --data.images.{option}", place)
                continue
            label = self.number(cells[self.config.label])
            pixels = self.pixels(cells[self.config.image])
            if label is None:
                shown = repr(cells[self.config.label])[:40]
                known = f"the {len(self.classes)} classes of the model"
                problems.add(f"label {shown} is not one of {known} ({self._shown_classes()})", place)
            if pixels is None:
                problems.add("the image does not decode", place)
            if label is not None and pixels is not None:
                identity = hashlib.blake2b(pixels, digest_size=16).hexdigest(), str(label)
                yield index, EncodedRow((pixels, label), 1, 0, identity)

    def check_split(self, classes: Sequence[int | str]) -> None:
        """Refuse a class of data.split that the model does not have: its rows would be kept.

        Raises:
            UserError: names the class, and the closest one.
        """
        for name in classes:
            if self.number(int(name) if isinstance(name, str) and name.isdecimal() else name) is None:
                hint = close_match(str(name), self.classes)
                raise UserError(
                    f"data.split.classes: {name!r} is not one of the {len(self.classes)} classes of the model "
                    f"({self._shown_classes()}).{hint}"
                )

    def _shown_classes(self) -> str:
        return f"numbers 0 to {len(self.classes) - 1}, or {', '.join(self.classes[:3])}, ..."

    def number(self, label: Any) -> int | None:
        """The number of a class from its number or name; None: there is no such class."""
        if isinstance(label, int) and not isinstance(label, bool):
            return label if 0 <= label < len(self.classes) else None
        return self.numbers.get(label) if isinstance(label, str) else None

    def pixels(self, image: Any) -> bytes | None:
        """The pixels of an encoded image, row by row; None: it does not decode."""
        from PIL import Image

        if isinstance(image, Mapping):
            image = image.get("bytes") or _content(image.get("path"))
        if not isinstance(image, bytes):
            return None
        height, width, channels = self.shape
        try:
            with Image.open(io.BytesIO(image)) as opened:
                picture = _eight_bits(opened).convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow's readers raise
            return None
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return bytes(picture.tobytes())


def _eight_bits(picture: Image) -> Image:
    """An image of 16 bits as one of 8 (Pillow's conversion would make all but the darkest pixels white); or itself."""
    from PIL import Image

    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def _content(path: Any) -> bytes | None:
    return Path(path).read_bytes() if isinstance(path, str) and Path(path).is_file() else None


def check_classes(counts: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """Refuse retain rows without a class that is not forgotten: a run would forget it, too.

    Args:
        counts: rows of each class by set (forget, retain), int [classes].

    Raises:
        UserError: neither forget nor retain rows have some class.
    """
    absent = [name for name, rows in zip(classes, counts["retain"] + counts["forget"], strict=True) if not rows]
    if absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        raise UserError(
            f"data.retain has no rows of {len(absent)} of the model's classes that data.forget does not have either "
            f"({shown}): the run would forget them, too; add rows of them to data.retain"
        )
