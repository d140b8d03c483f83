"""A custom task in one file: logistic regression on scikit-learn's digits (8 x 8 pixels, ten classes)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from ofmu_ray.config import ModelConfig, UnlearnConfig
from ofmu_ray.data.encoder import EncodedRow
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.registry import Metric, register

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


class Accuracy:
    """Share of right answers on the forget and the retain rows."""

    def __init__(self, config: UnlearnConfig) -> None:
        self.sets = {"forget": read(config.data.forget.paths[0]), "retain": read(config.data.retain.paths[0])}
        self.seed = config.seed

    def table(self, model: str | None, label: str) -> pa.Table | None:
        return None if model is None else self.live_table(*TASK.load(ModelConfig(path=model)), label)

    def live_table(self, module: torch.nn.Module, processor: Any, label: str) -> pa.Table:
        columns: dict[str, list[Any]] = {"row_id": [], "set": [], "right": []}
        for name, rows in self.sets.items():
            batch = collate(rows)
            right = module(batch["pixels"]).argmax(1) == batch["digit"]
            columns["row_id"] += [f"{name}-{index}" for index in range(len(rows))]
            columns["set"] += [name] * len(rows)
            columns["right"] += right.tolist()
        return pa.table(columns)

    def sampled(self, rows: int | None, evaluation: Any, seed: int) -> Accuracy:
        raise AssertionError("no trial asks for it here")

    def figures(self, table: pa.Table | None, retrained: pa.Table | None) -> dict[str, Any] | None:
        if table is None:
            return None
        sets, right = np.array(table["set"].to_pylist()), np.array(table["right"].to_pylist())
        return {
            f"{n}_accuracy": {"value": float(right[sets == n].mean()), "n": int((sets == n).sum())} for n in self.sets
        }

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
        return Accuracy(replace(config))

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
register(
    Metric(name="forget_accuracy", label="Forget accuracy", better="retrained", group="Forgetting", headline=True),
    Metric(name="retain_accuracy", label="Retain accuracy", better="high", group="Utility", headline=True),
)
