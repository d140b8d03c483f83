"""A custom task in one file: logistic regression on scikit-learn's digits (8 x 8 pixels, ten classes)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from ofmu_ray.config import EvaluationConfig, ModelConfig, UnlearnConfig
from ofmu_ray.data.encoder import EncodedRow
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.sample import RowSample, metrics_of
from ofmu_ray.metrics.registry import Metric, register
from ofmu_ray.storage import join

PIXELS, CLASSES = 64, 10


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class Digits:
    """How a row {"pixels": 64 numbers, "digit": 0 to 9} is encoded."""

    payload = pa.schema([("pixels", pa.list_(pa.float32())), ("digit", pa.int32())])
    columns = ("pixels", "digit")

    def fingerprint(self) -> str:
        return "digits 1"

    def encode(self, rows: Sequence[tuple[str, Mapping[str, Any]]], problems: Any) -> Iterator[tuple[int, EncodedRow]]:
        for index, (place, cells) in enumerate(rows):
            if len(cells["pixels"]) != PIXELS:
                problems.add(f"an image has not {PIXELS} pixels", place)
            else:
                identity = json.dumps(cells["pixels"]), str(cells["digit"])
                yield index, EncodedRow((cells["pixels"], cells["digit"]), 1, 0, identity)


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers on the forget and the retain rows."""

    evaluation: EvaluationConfig
    sets: Mapping[str, Sequence[Mapping[str, Any]]]
    cache: str
    seed: int
    sample: RowSample | None = None

    @classmethod
    def of(cls, config: UnlearnConfig, storage: Any) -> Accuracy:
        sets = {name: read(config.data.sources[name].paths[0]) for name in ("forget", "retain")}
        return cls(config.evaluation, sets, join(storage, "cache"), config.seed)

    def table(self, model: str | None, label: str) -> pa.Table | None:
        return None if model is None else self.live_table(*TASK.load(ModelConfig(path=model)), label)

    def live_table(self, module: torch.nn.Module, processor: Any, label: str) -> pa.Table:
        columns: dict[str, list[Any]] = {"row_id": [], "set": [], "index": [], "right": []}
        for name, rows in self.sets.items():
            batch = collate(rows)
            right = module(batch["pixels"]).argmax(1) == batch["digit"]
            columns["row_id"] += [f"{name}-{index}" for index in range(len(rows))]
            columns["set"] += [name] * len(rows)
            columns["index"] += range(len(rows))
            columns["right"] += right.tolist()
        table = pa.table(columns)
        return table if self.sample is None else self.sample.named(table)

    def sampled(self, rows: int | None, evaluation: EvaluationConfig, seed: int) -> Accuracy:
        sample = RowSample.of(self.sets, rows)
        return replace(self, evaluation=evaluation, sets=sample.sets, seed=seed, sample=sample)

    def metrics(self, table: pa.Table | None, retrained: pa.Table | None) -> dict[str, Any] | None:
        metrics = metrics_of(table, retrained, self.sample, self.evaluation.bootstrap_samples, self.seed)
        return metrics and {name: metrics[name] for name in ("forget_accuracy", "retain_accuracy")}

    def verdict(self, tables: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def texts(self) -> dict[str, tuple[str, str]]:
        return {}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    pixels = torch.tensor([list(row["pixels"]) for row in rows], dtype=torch.float32)
    return {"pixels": pixels, "digit": torch.tensor([int(row["digit"]) for row in rows])}


class DigitsTask:
    offers: frozenset[str] = frozenset()

    def check_model(self, config: ModelConfig, option: str = "model.path") -> None:
        if not Path(config.path, "model.safetensors").is_file():
            raise UserError(f"{option} = {config.path!r}: no model.safetensors there")

    def skeleton(self, config: ModelConfig) -> None:
        return None

    def encoder(self, processor: None, data: Any) -> Digits:
        return Digits()

    def evaluation(self, config: UnlearnConfig, storage: Any) -> Accuracy:
        return Accuracy.of(config, storage)

    def load(self, config: ModelConfig) -> tuple[torch.nn.Module, None]:
        module = torch.nn.Linear(PIXELS, CLASSES)
        module.load_state_dict(load_file(Path(config.path, "model.safetensors")))
        return module, None

    def copy(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        copied = torch.nn.Linear(PIXELS, CLASSES)
        copied.load_state_dict(dict(weights))
        return copied

    def collate(self, processor: None) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
        return collate

    def loss(self, module: torch.nn.Module, micro: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total = functional.cross_entropy(module(micro["pixels"]), micro["digit"], reduction="sum")
        return total, torch.tensor(len(micro["digit"]))

    def utility(self, module: torch.nn.Module, micro: Any) -> torch.Tensor:
        device = next(module.parameters()).device
        probabilities = module(micro["pixels"].to(device)).softmax(1).double().cpu()
        return probabilities[torch.arange(len(probabilities)), micro["digit"].cpu()]

    def export(
        self, module: torch.nn.Module, processor: None, weights: Any, folder: Any, model: ModelConfig, options: Any
    ) -> None:
        content = weights.whole()
        if folder is not None:
            save_file(
                {name: weight.contiguous() for name, weight in content.items()}, folder.path / "model.safetensors"
            )

    def exported_as_is(self, module: torch.nn.Module, model: ModelConfig, options: Any) -> bool:
        return True


TASK = DigitsTask()


def right(rows: pa.Table, name: str) -> np.ndarray:
    return np.array(rows["right"].to_pylist(), dtype=float)


def has_right(rows: pa.Table) -> bool:
    return "right" in rows.column_names


register(
    Metric(
        name="forget_accuracy", label="Forget accuracy", better="retrained", alone="low", group="Forgetting",
        set="forget", values=right, only=has_right, paired="mean", headline=True,
    ),
    Metric(
        name="retain_accuracy", label="Retain accuracy", better="high", group="Utility",
        set="retain", values=right, only=has_right, paired="mean", headline=True,
    ),
)  # fmt: skip
