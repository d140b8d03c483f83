"""Evaluation of image classifiers: forget, retain and test rows without augmentation, by the metrics of images.

The reference code (OPTML-Group/Unlearn-Saliency) may score forget images under training augmentation, because the call
that should change their transforms gets the loader instead of the data set; here no set is augmented.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from ofmu_ray import progress
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import EvaluationConfig, ModelConfig, SourceConfig, UnlearnConfig
from ofmu_ray.data import sources
from ofmu_ray.data.image_encoder import ImageEncoder, check_classes
from ofmu_ray.data.image_files import png, stacked
from ofmu_ray.data.row_checks import Problems, refuse
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.cache import TableCache
from ofmu_ray.evaluation.rows import is_private
from ofmu_ray.evaluation.sample import RowSample, metrics_of, spread
from ofmu_ray.storage import PathLike, join

CHUNK = 2000
"""Images of one task."""
OPERATIONS = 2.7e4
"""Operations for each pixel and channel, to decide where to evaluate: ResNet-20's."""


@dataclass(frozen=True)
class ImageSet:
    """The images of a set, decoded."""

    pixels: np.ndarray
    """uint8 [images, height, width, channels]."""
    labels: np.ndarray
    """int64 [images]."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Sequence[int]) -> ImageSet:
        """Some of them."""
        return ImageSet(self.pixels[list(chosen)], self.labels[list(chosen)])


@dataclass(frozen=True)
class ImageEvaluator:
    """The evaluation of a run; results are cached under <storage>/cache by weights and images."""

    evaluation: EvaluationConfig
    images: Mapping[str, ImageSet]
    sets: Mapping[str, Sequence[Mapping[str, Any]]]
    """Digests of the images, to know the sets by their content."""
    classes: Sequence[str]
    cache: PathLike
    seed: int = 0
    reveal: bool = False
    """Whether forget images may be shown."""
    sample: RowSample | None = None

    @classmethod
    def of(cls, config: UnlearnConfig, encoder: ImageEncoder, storage: PathLike) -> ImageEvaluator:
        """Read and decode the rows.

        Raises:
            UserError: rows that cannot be used, with all problems; a class that is neither to keep nor to forget.
        """
        named = config.data.sources
        images: dict[str, ImageSet] = {}
        if config.evaluation.enabled:
            root, limit = config.data.root, config.evaluation.max_rows
            counts = {name: _counts(named[name], root, name, encoder) for name in ("forget", "retain")}
            check_classes(counts, encoder.classes)
            problems: dict[str, tuple[str, Problems]] = {}
            for name in [name for name in ("forget", "retain", "test") if name in named]:
                chosen = None
                if limit is not None:  # folders, and many files, are sorted by class
                    count = counts[name] if name in counts else _counts(named[name], root, name, encoder)
                    chosen = set(spread(int(count.sum()), limit))
                images[name], problem = _read(named[name], root, name, encoder, chosen)
                problems[f"data.{name}"] = named[name].shown, problem
            refuse(problems)
            if "test" in images:
                images |= _apart(images["test"], (counts["forget"] > 0) & (counts["retain"] == 0))
        sets = {name: _digests(one) for name, one in images.items()}
        return cls(
            config.evaluation, images, sets, encoder.classes, join(storage, "cache"), config.seed,
            config.report.reveal_text,
        )  # fmt: skip

    def check_fits(self, model: str, option: str) -> None:
        """Raise UserError, which names `option`, if the model has another number of classes than the rows."""
        from ofmu_ray.models.classifiers import ImageProcessor

        classes = ImageProcessor.read(model, option).classes
        if len(classes) != len(self.classes):
            raise UserError(
                f"{option} = {model!r} has {len(classes)} classes, and the rows were read for {len(self.classes)}: all "
                "models need the same classes"
            )

    def table(self, model: str | None, label: str) -> pa.Table | None:
        """Per-row values of the model at a path; None without a model, or if evaluation is off."""
        if model is None or not self.evaluation.enabled:
            return None
        from ofmu_ray.cluster.map_tasks import device_kind, map_tasks, runs_here
        from ofmu_ray.models.source import model_fingerprint, weights_folder

        folder = weights_folder(resolve_builtin(model))
        cache = TableCache(self.cache, "images")
        content = json.dumps(
            [model_fingerprint(folder), device_kind(), {n: list(rows) for n, rows in self.sets.items()}]
        )
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        known = cache.load(key)
        if known is None:
            jobs = [
                (name, start, one.pixels[start : start + CHUNK])
                for name, one in self.images.items()
                for start in range(0, len(one), CHUNK)
            ]
            make = partial(_predictor, str(folder), device_kind(), self.evaluation.batch_size)
            work = OPERATIONS * sum(pixels.size for _, _, pixels in jobs)
            done: dict[int, np.ndarray] = {}
            with progress.bar(f"evaluate {label}", len(jobs), "batch") as bar:
                for number, values in enumerate(map(make(), jobs)) if runs_here(work) else map_tasks(make, jobs):
                    done[number] = values
                    bar.update()
            known = self._table([done[number] for number in range(len(jobs))], jobs)
            cache.save(key, known)
        return known if self.sample is None else self._named(known)

    def live_table(self, module: Any, processor: Any, label: str) -> pa.Table:
        """The same for a model in memory."""
        from ofmu_ray.models.classifiers import predictions

        training = module.training
        module.eval()
        size = self.evaluation.batch_size
        jobs = [(name, 0, one.pixels) for name, one in self.images.items()]
        table = self._table([predictions(module, processor, pixels, size) for _, _, pixels in jobs], jobs)
        module.train(training)
        return table if self.sample is None else self._named(table)

    def _table(self, probabilities: Sequence[np.ndarray], jobs: Sequence[tuple[str, int, np.ndarray]]) -> pa.Table:
        pieces = []
        for (name, start, pixels), values in zip(jobs, probabilities, strict=True):
            labels = self.images[name].labels[start : start + len(pixels)]
            index = np.arange(start, start + len(pixels))
            pieces.append(
                pa.table(
                    {
                        "row_id": [f"{name}-{number}" for number in index],
                        "set": [name] * len(index),
                        "index": pa.array(index, pa.int32()),
                        "label": pa.array(labels, pa.int32()),
                        "predicted": pa.array(values.argmax(1), pa.int32()),
                        "confidence": pa.array(values[np.arange(len(labels)), labels].astype(np.float64)),
                    }
                )
            )
        return pa.concat_tables(pieces)

    def _named(self, table: pa.Table) -> pa.Table:
        assert self.sample is not None
        return self.sample.named(table)

    def sampled(self, rows: int | None, evaluation: EvaluationConfig, seed: int) -> ImageEvaluator:
        """A copy for `rows` rows of each set, evenly spread (None: all)."""
        sample = RowSample.of(self.sets, rows)
        images = {name: self.images[name].take(places) for name, places in sample.places.items()}
        return replace(self, evaluation=evaluation, seed=seed, images=images, sets=sample.sets, sample=sample)

    def metrics(self, table: pa.Table | None, retrained: pa.Table | None) -> dict[str, Any] | None:
        """Metrics of a model; None without a table."""
        return metrics_of(table, retrained, self.sample, self.evaluation.bootstrap_samples, self.seed)

    def verdict(self, tables: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing beyond the metrics."""
        return {}

    def texts(self) -> dict[str, tuple[str, str]]:
        """Rows are not texts."""
        return {}

    def pictures(self, row_ids: Sequence[str]) -> dict[str, bytes]:
        """Row id -> PNG of the images that may be shown."""
        shown = {}
        for row_id in row_ids:
            name, _, index = row_id.rpartition("-")
            if self.reveal or not is_private(name):
                shown[row_id] = png(self.images[name].pixels[int(index)])
        return shown


def _predictor(folder: str, device: str, batch_size: int) -> Callable[[tuple[str, int, np.ndarray]], np.ndarray]:
    from ofmu_ray.models.classifiers import load_classifier, predictions

    module, processor = load_classifier(ModelConfig(path=folder))
    module.to(device).eval()
    return lambda job: predictions(module, processor, job[2], batch_size)


def _read(
    source: SourceConfig, root: str | None, name: str, encoder: ImageEncoder, chosen: Container[int] | None
) -> tuple[ImageSet, Problems]:
    """The rows of a source with these indices, or all."""
    problems, pixels, labels, count = Problems(), [], [], 0
    for piece in sources.fragments(source, root, stream=name, option=f"data.{name}"):
        for number, row in sources.read(piece, list(encoder.columns)):
            count += 1
            if chosen is not None and count - 1 not in chosen:
                continue
            place = f"{piece.name.rpartition('/')[2]} row {number}"
            if isinstance(row, sources.UnreadableRow):
                problems.add(row.kind, place)
                continue
            for _, encoded in encoder.encode([(place, row)], problems):
                pixels.append(encoded.payload[0])
                labels.append(encoded.payload[1])
    problems.empty = not count
    return ImageSet(stacked(pixels, encoder.shape), np.array(labels, dtype=np.int64)), problems


def _counts(source: SourceConfig, root: str | None, name: str, encoder: ImageEncoder) -> np.ndarray:
    """Rows of each class in a source, int64 [classes]; rows with other labels are refused elsewhere."""
    counts = np.zeros(len(encoder.classes), dtype=np.int64)
    for piece in sources.fragments(source, root, stream=name, option=f"data.{name}"):
        for _, row in sources.read(piece, [encoder.config.label]):
            number = encoder.number(row.get(encoder.config.label)) if isinstance(row, dict) else None
            if number is not None:
                counts[number] += 1
    return counts


def _apart(test: ImageSet, forgotten: np.ndarray) -> dict[str, ImageSet]:
    """The test rows of the classes to keep, and those of classes that are forgotten whole, if any."""
    theirs = forgotten[test.labels]
    if not theirs.any():
        return {"test": test}
    return {
        "test": test.take(np.flatnonzero(~theirs).tolist()),
        "test_forgotten": test.take(np.flatnonzero(theirs).tolist()),
    }


def _digests(images: ImageSet) -> list[dict[str, str]]:
    rows = zip(images.pixels, images.labels.tolist(), strict=True)
    return [{"sha": hashlib.blake2b(p.tobytes() + bytes([n % 256]), digest_size=8).hexdigest()} for p, n in rows]
