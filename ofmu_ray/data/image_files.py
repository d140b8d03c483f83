"""Images as rows: a folder with a folder of files for each class, and scikit-learn's digits, which are built in."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from ofmu_ray.errors import UserError
from ofmu_ray.storage import locate, without_credentials

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FILES_PER_TASK = 2000
DIGITS = ("builtin:digits/train", "builtin:digits/test")
"""The 1797 images of 8 x 8 pixels that scikit-learn ships, every fifth of them for tests."""
TEST_EVERY = 5

Files = tuple[tuple[str, str], ...]
"""(path, class) of each image."""


def found(path: str, option: str) -> list[tuple[Files, str]]:
    """The images below `path` in pieces for one task each, sorted by class and name, each with its identity.

    The identity covers names, sizes and times of change.

    Raises:
        UserError: no such folder, or it has no folders with images.
    """
    filesystem, inside = locate(path, option)
    infos = filesystem.get_file_info(pafs.FileSelector(inside, recursive=True, allow_not_found=True)) if inside else []
    root = inside.rstrip("/")
    images = []
    for info in sorted(infos, key=lambda info: info.path):
        name, _, rest = info.path[len(root) + 1 :].partition("/")
        wanted = info.type == pafs.FileType.File and info.path.lower().endswith(SUFFIXES)
        if rest and wanted and not hidden(info.path, root):
            images.append((info, name))
    if not images:
        raise UserError(
            f"{option} = {without_credentials(path)}: no images; format images is a folder with one folder of images "
            f"({', '.join(suffix[1:] for suffix in SUFFIXES[:4])}, ...) for each class"
        )
    scheme = path[: path.index(root)] if "://" in path and root in path else ""
    pieces = []
    for start in range(0, len(images), FILES_PER_TASK):
        chosen = images[start : start + FILES_PER_TASK]
        seen = json.dumps([[info.path[len(root) :], info.size, info.mtime_ns] for info, _ in chosen])
        files = tuple((scheme + info.path, name) for info, name in chosen)
        pieces.append((files, hashlib.sha256(seen.encode()).hexdigest()))
    return pieces


def hidden(path: str, folder: str, marks: tuple[str, ...] = (".",)) -> bool:
    """Whether some name below the folder starts with a mark: copies and notes of editors and systems, such as
    .ipynb_checkpoints/a-checkpoint.png, ._a.png and _temporary/a.parquet."""
    return any(name.startswith(marks) for name in path.removeprefix(folder).strip("/").split("/"))


def read(files: Files, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the row, {image, label}) of each file; the image is its bytes."""
    for number, (path, name) in enumerate(files, start=first):
        filesystem, inside = locate(path)
        with filesystem.open_input_stream(inside) as stream:
            yield number, {"image": stream.readall(), "label": name}


def digits(path: str) -> pa.Table:
    """scikit-learn's digits as rows of a PNG and a label."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    test = np.arange(len(labels)) % TEST_EVERY == 0
    chosen = np.flatnonzero(test == path.endswith("/test"))
    images = [png((pixels[row].reshape(8, 8) * 255 / 16).round().astype(np.uint8)) for row in chosen]
    return pa.table({"image": images, "label": pa.array(labels[chosen], pa.int64())})


def png(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 [height, width] or [height, width, channels], as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(stream, "PNG")
    return stream.getvalue()


def stacked(images: Sequence[bytes], shape: tuple[int, int, int]) -> np.ndarray:
    """Raw pixels of images as one array, uint8 [images, height, width, channels]."""
    return np.frombuffer(b"".join(images), dtype=np.uint8).reshape(len(images), *shape)
