"""What a method needs to know about rows under the reference model: computed once, before the first round.

Each quantity of a stream becomes a table (ofmu_ray.data.sidecar) under <cache>/reference/<hash of weights, tokens,
rows, quantity and this code>, so the runs of a sweep compute it once. Anything that could reveal a forget row's text is
kept in the run's own folder and deleted with it: refusals and alternatives, which start with the question, and
log-probabilities and activations of forget rows, since the likeliest words of a model that knows a text spell it.

Small jobs run in this process; larger ones in processes with one CPU or GPU each, which load the model once. Where the
run's workers share a model that may fit no device, they compute all of it before their first round instead
(ofmu_ray.training.live_references), with the model that they hold.
"""

from __future__ import annotations

import functools
import importlib.resources
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ofmu_ray import progress
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.cluster.map_tasks import device_kind, map_tasks, running_ray, runs_here
from ofmu_ray.config import ModelConfig
from ofmu_ray.data.batch_plan import Plan, places
from ofmu_ray.data.prepare import PreparedData
from ofmu_ray.data.sidecar import SidecarContent
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.generation import stop_ids
from ofmu_ray.features import refusals
from ofmu_ray.features.builtin import NLL
from ofmu_ray.features.protocol import (
    FeatureContext,
    Need,
    ParameterValues,
    Reading,
    Row,
    Tokens,
    Values,
)
from ofmu_ray.features.value_tables import (
    LOGITS_AT_ONCE,
    ChosenRows,
    Missing,
    MissingTensors,
    MissingTexts,
    ValueTable,
    cut,
    digest,
    texts_in,
)
from ofmu_ray.models.loading import read_config
from ofmu_ray.models.source import model_fingerprint, weights_folder
from ofmu_ray.storage import atomic_write, is_file, join
from ofmu_ray.tasks import task_named

if TYPE_CHECKING:
    from ofmu_ray.tasks.protocol import Task

MOST_BYTES = 20 * 10**9
"""Larger tables are refused."""
_CODE = (
    *("features/reference.py", "features/value_tables.py"),
    *("engines/layers.py", "models/answers.py", "evaluation/generation.py"),
)


def write_references(
    needs: Sequence[Need],
    prepared: PreparedData,
    plan: Plan,
    model: ModelConfig,
    *,
    folder: str,
    cache: str,
    private: str | None = None,
    settings: FeatureContext | None = None,
    left: list[Missing] | None = None,
) -> dict[str, str]:
    """Compute what is missing of `needs`; returns the sidecars' folders (<folder>/<stream>) by stream.

    `cache`: the storage's cache folder. `private`: folder for what must be deleted with the run (default
    <folder>/private); the caller deletes it. Of all streams but forget, only the rows that the plan uses are processed,
    if it uses any. `left`: receives what is missing and the run's workers can compute (`in_step`, texts); the sidecars
    name it already.

    Raises UserError: a table is too large, the refusals are unusable, the model has no such layer, or it has to be
    loaded whole and does not fit.
    """
    if not needs:
        return {}
    settings = settings or FeatureContext()
    source = ReferenceModel(model, cache, private or join(folder, "private"), settings.method, task_of(prepared), left)
    folders = {}
    for stream in dict.fromkeys(need.stream for need in needs):
        tokenised = prepared.streams[stream]
        planned = stream != "forget" and stream in plan.streams
        chosen = ChosenRows(tokenised, np.unique(places(tokenised, plan).row) if planned else tokenised.all_rows())
        sidecar = SidecarContent()
        texts: dict[Tokens, str] = {}

        def written(tokens: Tokens, chosen: ChosenRows = chosen, texts: dict[Tokens, str] = texts) -> str:
            if tokens not in texts:
                texts[tokens] = source.texts(tokens.resolved(settings), chosen, prepared)
            return texts[tokens]

        for need in (need for need in needs if need.stream == stream):
            if isinstance(need.feature, Tokens):
                sidecar.add_texts(need.feature.prefix, written(need.feature), need.feature.count)
            elif isinstance(need.feature, ParameterValues):
                tensors = need.feature.resolved(settings, prepared)
                sidecar.parameters[tensors.name] = source.parameters(tensors, chosen)
            elif need.of is None:
                table = source.table(need.feature.resolved(settings), stream, chosen.read, chosen.key)
                sidecar.add_table(need.feature.name, need.feature.key, table.folder)
            else:
                path, prefix = written(need.of), need.of.prefix
                read = partial(texts_in, path)
                name = f"{stream}_{prefix.strip('_')}"
                table = source.table(need.feature, name, read, Path(path).stem, known=is_file(path))
                sidecar.add_table(prefix + need.feature.name, prefix + need.feature.key, table.folder)
        folders[stream] = sidecar.write(join(folder, stream))
    return folders


def stream_losses(
    prepared: PreparedData,
    name: str,
    model: ModelConfig,
    cache: str,
    most: int = 1000,
    left: list[Missing] | None = None,
    by_workers: bool = True,
) -> np.ndarray | None:
    """Mean token loss of each row's answer under the reference model (nats), float64 [rows]. Cached.

    At most `most` rows of the stream, evenly spread. None: they are missing, and `left` has received them.
    `by_workers`: whether they may be left to the workers, which hold the model to change.
    """
    stream = prepared.streams[name]
    chosen = ChosenRows(stream, stream.spread(most))
    source = ReferenceModel(model, cache, "", "ofmu", task_of(prepared), left)
    table = source.table(NLL, name, chosen.read, chosen.key, by_workers=by_workers)
    return table.means() if table.written else None


def task_of(prepared: PreparedData) -> str:
    """The task whose models give features of these rows."""
    return getattr(prepared.encoder, "task", "causal_lm")


class ReferenceModel:
    """The model before any step, and where its tables are stored.

    `left`: receives the missing tables that workers can compute; None: they are computed here.
    """

    def __init__(
        self,
        model: ModelConfig,
        cache: str,
        private: str,
        method: str,
        task: str = "causal_lm",
        left: list[Missing] | None = None,
    ) -> None:
        self.task, self.left = task, left
        self.model = replace(model, lora=None, freeze=[], gradient_checkpointing=False)
        self.freeze = list(model.freeze)
        self.cache, self.private, self.method = join(cache, "reference"), private, method
        self.weights = weights_folder(resolve_builtin(model.path))
        self.fingerprint = digest(
            model_fingerprint(self.weights),
            model.precision,
            *(importlib.resources.files("ofmu_ray").joinpath(file).read_text() for file in _CODE),
        )

    @functools.cached_property
    def config(self) -> Any:
        """transformers' config of the text model."""
        return read_config(self.model.path, trust_remote_code=self.model.trust_remote_code).get_text_config()

    def texts(self, tokens: Tokens, chosen: ChosenRows, prepared: PreparedData) -> str:
        """Path of the rows' texts; the file name is a hash of everything that determines them."""
        key = digest(self.fingerprint, chosen.key, prepared.template.fingerprint(), _identity(tokens))
        path = join(self.private, f"{key}.parquet")
        if is_file(path):
            return path
        if self.left is not None and tokens.reads_model:
            self.left.append(MissingTexts(path, tokens, chosen.read, prepared.template))
        else:
            refusals.write_refusals(path, tokens.rows(self, chosen.rows, prepared.template))
        return path

    def parameters(self, feature: ParameterValues, chosen: ChosenRows) -> str:
        """Path of the named tensors, computed in this process if missing: of the parameters that the run trains."""
        from safetensors.torch import save

        key = digest(self.fingerprint, _identity(feature), chosen.key, *self.freeze)
        path = join(self.private, f"{key}.safetensors")
        if is_file(path):
            return path
        if self.left is not None and feature.in_step:
            self.left.append(MissingTensors(path, feature, chosen.read))
        else:
            self._refuse_whole(feature.name)
            reference = Reference.load(self.task, replace(self.model, freeze=self.freeze), device_kind())
            atomic_write(path, save(feature.compute(reference, chosen.rows)))
        return path

    def table(
        self,
        feature: Values,
        stream: str,
        read: Callable[[], list[Row]],
        rows_key: str,
        *,
        known: bool = True,
        by_workers: bool = True,
    ) -> ValueTable:
        """The table of the rows that `read` gives; computed, or left to the workers, if missing.

        `known`: whether the rows are there, and not left to the workers, too: then too large a table is refused.
        `by_workers`: whether the table may be left to them.
        """
        key = digest(self.fingerprint, _identity(feature), rows_key)
        folder = join(self.private if stream == "forget" and feature.spells else self.cache, key)
        table = ValueTable(folder, feature, stream, read, feature.shape(self.config), feature.width(self.config))
        if table.written:
            return table
        if self.left is None or not by_workers or not feature.in_step:
            rows = self._checked_rows(table)
            table.write(rows, self.read(feature, rows, *table.sizes(rows), table.title))
            return table
        if known:
            self._checked_rows(table)
        self.left.append(table)
        return table

    def _checked_rows(self, table: ValueTable) -> list[Row]:
        """The rows of a table that is not too large."""
        rows = table.read()
        entries = table.entries(rows)
        half = table.bytes_fp32(entries) // 2
        self._refuse_large(table.feature, table.stream, int(entries.sum()), table.shape, half)
        return rows

    def _refuse_large(self, feature: Values, stream: str, entries: int, shape: Sequence[int], size: int) -> None:
        if size > MOST_BYTES:
            remedy = f"--{self.method}.retain_loss nll, " if stream == "retain" and feature.name == "logits" else ""
            raise UserError(
                f"method {self.method} needs {feature.name} of the reference model at {entries} answer tokens of "
                f"{stream} rows, {shape[0]} numbers each: {size} bytes in fp16, more than {MOST_BYTES}; use {remedy}"
                "fewer rows or rounds, or another method"
            )

    @functools.cached_property
    def _stored_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weights.glob("*.safetensors"))

    def _refuse_whole(self, title: str) -> None:
        """Refuse a model of which one process would hold more than there is."""
        room = None if self.left is None else _room()
        if room is not None and self._stored_bytes > room:
            raise UserError(
                f"method {self.method} needs {title} from one process that loads the whole model, whose "
                f"{self._stored_bytes / 1e9:.3g} GB of weights do not fit {room / 1e9:.3g} GB; use a method whose "
                "reference values the workers compute, such as npo or dpo, or one that needs none"
            )

    def read(
        self, reading: Reading, rows: Sequence[Row], lengths: np.ndarray, wide: np.ndarray, title: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(row number, the model's result for it), once per row; `lengths`, `wide`: as in `cut`."""
        self._refuse_whole(title)
        batches = cut(lengths, wide, LOGITS_AT_ONCE[device_kind()])
        jobs = [[rows[number] for number in numbers] for numbers in batches]
        flops = 2 * self._stored_bytes / 4 * lengths.sum()
        with progress.bar(f"reference {title}", len(rows), "row") as bar:
            make = partial(_reader, self.task, self.model, reading, device_kind())
            for number, results in enumerate(map(make(), jobs)) if runs_here(flops) else map_tasks(make, jobs):
                yield from zip(batches[number], results, strict=True)
                bar.update(len(batches[number]))


class Reference:
    """The reference model in memory.

    `autocast`: its passes run in bf16, whatever its weights are.
    """

    def __init__(self, module: Any, processor: Any, task: Task, device: torch.device, *, autocast: bool) -> None:
        self.module, self.processor, self.device, self.autocast = module, processor, device, autocast
        self.collate, self.loss = task.collate(processor), task.loss

    @classmethod
    def load(cls, task: str, model: ModelConfig, device: str) -> Reference:
        """Load the whole model."""
        made = task_named(task)
        module, processor = made.load(model)
        autocast = model.precision == "bf16_autocast"
        return cls(module.to(device).eval(), processor, made, torch.device(device), autocast=autocast)

    @functools.cached_property
    def stop(self) -> frozenset[int]:
        """The tokens that end a text."""
        return stop_ids(self.module, self.processor)

    @torch.no_grad()
    def of(self, reading: Reading, rows: Sequence[Row]) -> list[np.ndarray]:
        """The results of `reading`, one per row."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return reading.read(self, rows)

    def collated(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """A micro-batch on the model's device."""
        return {name: tensor.to(self.device) for name, tensor in self.collate(rows).items()}


def _reader(
    task: str, model: ModelConfig, reading: Reading, device: str
) -> Callable[[Sequence[Row]], list[np.ndarray]]:
    return partial(Reference.load(task, model, device).of, reading)


def _room() -> int | None:
    """Bytes of the memory that a process here has for a model; None: unknown, as processes may run on other nodes."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    ray = running_ray()
    if ray is not None and len(ray.nodes()) > 1:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _identity(feature: Values | Tokens | ParameterValues) -> str:
    """What determines its values, apart from model and rows."""
    kind = type(feature)
    return json.dumps([kind.__qualname__, inspect.getsource(kind), asdict(feature)], sort_keys=True)
