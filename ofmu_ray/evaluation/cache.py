"""Evaluations by content: the same weights, rows, format and metric version are never run twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.rows import MEASURED, EvaluationRow, without_private_text
from ofmu_ray.metrics.functions import METRIC_VERSION
from ofmu_ray.storage import PathLike, atomic_write, fetched, is_file, is_uri, join, locate

_MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "*.py")


def weights_folder(model: str) -> Path:
    """The model's folder on this machine; what a hub name or a URI stands for is fetched once and kept.

    Raises UserError when there is neither, or when it holds no safetensors weights or no config.json.
    """
    folder = fetched(model, "model") if is_uri(model) else Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, allow_patterns=list(_MODEL_FILES)))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{model} is neither a model directory nor a model the hub serves ({type(error).__name__})"
            ) from None
    if not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        raise UserError(
            f"{model} is no model directory: it needs config.json and weights as *.safetensors "
            "(convert others with save_pretrained)"
        )
    return folder


def model_fingerprint(folder: Path) -> str:
    """Hex digest of the model's weights and configuration by content; the folder's name does not matter."""
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def cache_key(model: str, template: str, rows: Sequence[EvaluationRow], max_new_tokens: int, arithmetic: str) -> str:
    """Hex digest (32 digits) of all that decides a set's per-row values.

    `model`, `template`: fingerprints. `arithmetic`: device kind and number format, whose roundings differ. Batch size
    and number of actors are not part of it: they change values within rounding only.
    """
    content = [METRIC_VERSION, model, template, max_new_tokens, arithmetic, [asdict(row) for row in rows]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


class TableCache:
    """`<cache folder>/<kind>/<key>.parquet`: tables without private text."""

    def __init__(self, cache_folder: PathLike, kind: str) -> None:
        self.folder = join(cache_folder, kind)

    def load(self, key: str) -> pa.Table | None:
        """The stored table, or None."""
        path = join(self.folder, f"{key}.parquet")
        if not is_file(path):
            return None
        filesystem, inside = locate(path)
        return pq.read_table(inside, filesystem=filesystem, partitioning=None)

    def save(self, key: str, table: pa.Table) -> None:
        """Keep a table; a reader never sees half of it."""
        content = pa.BufferOutputStream()
        pq.write_table(table, content)
        atomic_write(join(self.folder, f"{key}.parquet"), content.getvalue().to_pybytes())


class EvaluationCache(TableCache):
    """Per-row values of sets, without the text of private ones."""

    def __init__(self, cache_folder: PathLike) -> None:
        super().__init__(cache_folder, "evaluation")

    def load(self, key: str) -> pa.Table | None:
        found = super().load(key)
        return None if found is None else found.cast(MEASURED)

    def save(self, key: str, table: pa.Table) -> None:
        super().save(key, without_private_text(table))
