"""What a page shows of images: samples with the predicted classes, and what forget rows are taken for."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SETS = ("forget", "test_forgotten", "retain", "test")
"""In the order of the page."""
MOST_CLASSES = 12
"""Classes with lines of their own, by their forget rows."""
MOST_PREDICTIONS = 5


@dataclass(frozen=True)
class Images:
    """What the page needs besides the tables."""

    classes: Sequence[str]
    pictures: Mapping[str, bytes]
    """Row id -> PNG, of the images that may be shown."""


@dataclass(frozen=True)
class ImageSample:
    """An image and what each model takes it for."""

    row_id: str
    picture: str | None
    """PNG as a data URI; None: not to be shown."""
    label: str
    predictions: dict[str, tuple[str, float, bool]]
    """Model -> (predicted class, probability of the true class, whether it is right)."""


@dataclass(frozen=True)
class ConfusionLine:
    """What a model takes the forget rows of a class for."""

    label: str
    model: str
    rows: int
    right: float
    """Share in percent."""
    predictions: str
    """The most frequent predicted classes, with their numbers."""


def images_of(evaluation: Any, tables: Mapping[str, Any], count: int) -> Images | None:
    """The content for `count` samples of each set, from a task's evaluation; None: its rows are not images."""
    if not hasattr(evaluation, "pictures") or not any(table is not None for table in tables.values()):
        return None
    return Images(evaluation.classes, evaluation.pictures(shown_rows(tables, count)))


def images_context(tables: Mapping[str, Any], images: Images | None, count: int) -> dict[str, Any]:
    """What images.html.j2 shows: `pictures` and `confusion`, empty without images."""
    if images is None:
        return {"pictures": {}, "confusion": []}
    return {
        "pictures": image_samples(tables, images, count),
        "confusion": confusion_lines(tables, images.classes),
    }


def shown_rows(tables: Mapping[str, Any], count: int) -> list[str]:
    """Ids of `count` rows of each set: first those that the first two models (of a run: before and after) take for
    different classes, evenly spread over the others."""
    first, second = ([_by_id(table) for table in tables.values() if table is not None] * 2)[:2]
    ids = []
    for name in SETS:
        rows = [row_id for row_id, row in second.items() if row["set"] == name]
        changed = [r for r in rows if r in first and first[r]["predicted"] != second[r]["predicted"]]
        other = [row_id for row_id in rows if row_id not in set(changed)]
        ids += (_spread(changed, count) + _spread(other, count))[:count]
    return ids


def image_samples(tables: Mapping[str, Any], images: Images, count: int) -> dict[str, list[ImageSample]]:
    """Set -> its samples."""
    models = {model: _by_id(table) for model, table in tables.items()}
    samples: dict[str, list[ImageSample]] = {}
    for row_id in shown_rows(tables, count):
        rows = {model: by_id[row_id] for model, by_id in models.items() if row_id in by_id}
        first = next(iter(rows.values()))
        content = images.pictures.get(row_id)
        sample = ImageSample(
            row_id,
            None if content is None else f"data:image/png;base64,{base64.b64encode(content).decode()}",
            images.classes[first["label"]],
            {
                model: (images.classes[row["predicted"]], row["confidence"], row["predicted"] == row["label"])
                for model, row in rows.items()
            },
        )
        samples.setdefault(first["set"], []).append(sample)
    return samples


def confusion_lines(tables: Mapping[str, Any], classes: Sequence[str]) -> list[ConfusionLine]:
    """What each model takes the forget rows of each class for, the classes with most of them first."""
    counts: dict[int, dict[str, Counter[int]]] = {}
    for model, table in tables.items():
        for row in _by_id(table).values():
            if row["set"] == "forget":
                by_model = counts.setdefault(row["label"], {})
                by_model.setdefault(model, Counter())[row["predicted"]] += 1
    order = sorted(counts, key=lambda label: (-sum(next(iter(counts[label].values())).values()), label))
    lines = []
    for label in order[:MOST_CLASSES]:
        for model, predicted in counts[label].items():
            total = sum(predicted.values())
            most = predicted.most_common(MOST_PREDICTIONS)
            words = ", ".join(f"{classes[number]} {times}" for number, times in most)
            lines.append(ConfusionLine(classes[label], model, total, 100 * predicted[label] / total, words))
    return lines


def _by_id(table: Any) -> dict[str, dict[str, Any]]:
    return {} if table is None else {row["row_id"]: row for row in table.to_pylist()}


def _spread(ids: Sequence[str], count: int) -> list[str]:
    return list(ids) if count >= len(ids) else [ids[index * len(ids) // count] for index in range(count)]
