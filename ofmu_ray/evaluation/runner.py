"""Evaluate a model directory: the same code and the same numbers within a run and standalone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from ofmu_ray import progress
from ofmu_ray.cluster.map_tasks import device_kind
from ofmu_ray.config import EvaluationConfig, FormatConfig, ModelConfig
from ofmu_ray.data.template import Template
from ofmu_ray.evaluation.actors import Loading, run_units
from ofmu_ray.evaluation.cache import EvaluationCache, cache_key
from ofmu_ray.evaluation.in_step import run_together
from ofmu_ray.evaluation.rows import (
    MEASURED,
    EvaluationRow,
    evaluation_rows,
    is_private,
    with_row_metrics,
    without_private_text,
)
from ofmu_ray.evaluation.scorer import Scorer
from ofmu_ray.evaluation.units import Result, Unit, assemble, plan
from ofmu_ray.metrics.summary import summarise
from ofmu_ray.models.loading import load_tokenizer
from ofmu_ray.models.source import base_folder, model_fingerprint, weights_folder
from ofmu_ray.storage import PathLike

__all__ = ["evaluate_live", "evaluate_model", "summarise"]

Run = Callable[[Sequence[Unit]], Iterable[tuple[int, Result]]]
"""Units -> (index of a unit, its values), every unit once."""


def evaluate_model(
    model_dir: str | Path,
    tokenizer_dir: str | Path,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    fmt: FormatConfig,
    config: EvaluationConfig,
    storage_cache_dir: PathLike,
    *,
    label: str,
    reveal_text: bool = False,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> pa.Table:
    """Per-row values of a model on each set, for `summarise`, the report and `rows.parquet`.

    `model_dir`, `tokenizer_dir`: folders that every node can read, URIs or hub names.
    `sets`: name -> rows in TOFU's layout, of which the first `config.max_rows` count; rows are named `<set>-<index>`.
    `storage_cache_dir`: path or URI; a set in its cache is not run again. `label`: shown next to the progress
    bar. `dtype`: of the weights. Columns: `rows.MEASURED`, `probability`, `truth_ratio`. `generated` is null for forget
    rows unless `reveal_text`, which runs them again, because the cache never contains their text.

    Raises UserError for unusable rows, and for folders without a model or a tokenizer.
    """
    rows = _rows(sets, fmt, config)
    loading = loading_of(
        model_dir,
        tokenizer_dir,
        fmt,
        max_new_tokens=config.max_new_tokens,
        dtype=dtype,
        device_map=config.device_map,
        trust_remote_code=trust_remote_code,
    )
    store = Store.of(storage_cache_dir, model_dir, loading)
    return _table(
        rows,
        loading.template,
        config,
        label,
        reveal_text,
        store,
        lambda units: run_units(units, loading, config.actors),
    )


def stored_table(
    store: Store,
    template: Template,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    fmt: FormatConfig,
    config: EvaluationConfig,
    *,
    reveal_text: bool = False,
) -> pa.Table | None:
    """The table of `evaluate_model` if the cache has all of it, else None."""
    rows = _rows(sets, fmt, config)
    if reveal_text and any(map(is_private, rows)):
        return None
    cache = EvaluationCache(store.folder)
    tables = [cache.load(key) for key in store.keys(rows, template, config).values()]
    known = [table for table in tables if table is not None]
    return without_private_text(with_row_metrics(pa.concat_tables(known))) if len(known) == len(tables) else None


def store_table(
    table: pa.Table,
    store: Store,
    template: Template,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    fmt: FormatConfig,
    config: EvaluationConfig,
) -> None:
    """Put a model's complete table, from wherever, into the cache of `evaluate_model`."""
    cache, measured = EvaluationCache(store.folder), table.select(MEASURED.names)
    for name, key in store.keys(_rows(sets, fmt, config), template, config).items():
        cache.save(key, measured.filter(pc.equal(measured["set"], name)))


def evaluate_live(
    module: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    fmt: FormatConfig,
    config: EvaluationConfig,
    *,
    label: str,
    reveal_text: bool = False,
    storage_cache_dir: PathLike | None = None,
    fingerprint: str | None = None,
    together: bool = False,
) -> pa.Table:
    """`evaluate_model` for a causal language model of transformers in memory, on its device and in its precision.

    In fp32 the table equals that of the exported folder. Runs in this process and restores the module's mode.
    `storage_cache_dir` and `fingerprint` (of the weights: `models.source.model_fingerprint`, or any text that changes
    with them): store and reuse the values; without both, nothing is stored. `together`: all ranks of the process group
    hold this model and share the rows, and each returns the table (collective; stores nothing).
    """
    rows = _rows(sets, fmt, config)
    template = Template(tokenizer, fmt)
    store = None
    if storage_cache_dir is not None and fingerprint is not None and not together:
        weight = module.get_input_embeddings().weight
        store = Store(storage_cache_dir, fingerprint, arithmetic(weight.device.type, weight.dtype))
    training = module.training
    module.eval()
    try:
        scorer = Scorer(module, tokenizer, template, max_new_tokens=config.max_new_tokens)
        run: Run = partial(run_together, scorer) if together else scorer.run_all
        return _table(rows, template, config, label, reveal_text, store, run)
    finally:
        module.train(training)


def loading_of(
    model_dir: str | Path,
    tokenizer_dir: str | Path,
    fmt: FormatConfig,
    *,
    max_new_tokens: int,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Loading:
    """How every process loads this model, in `dtype`. Raises UserError for folders without a model or a tokenizer."""
    tokenizer = _tokenizer(str(tokenizer_dir), trust_remote_code)
    weights = base_folder(weights_folder(str(model_dir)))
    return Loading(
        model=str(model_dir),
        weights_bytes=sum(path.stat().st_size for path in weights.glob("*.safetensors")),
        tokenizer=tokenizer,
        template=Template(tokenizer, fmt),
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )


def arithmetic(device: str, dtype: torch.dtype) -> str:
    """Device kind and number format: models evaluated in two of them differ by rounding."""
    return f"{device}/{'fp32' if dtype == torch.float32 else str(dtype)}"


@dataclass(frozen=True)
class Store:
    """Where the values of one model are stored."""

    folder: PathLike
    model: str
    """Fingerprint."""
    arithmetic: str

    @classmethod
    def of(cls, folder: PathLike, model_dir: str | Path, loading: Loading) -> Store:
        """The store of a model's folder, as `loading` loads it."""
        fingerprint = model_fingerprint(weights_folder(str(model_dir)))
        return cls(folder, fingerprint, arithmetic(device_kind(), loading.dtype))

    def keys(
        self, rows: Mapping[str, Sequence[EvaluationRow]], template: Template, config: EvaluationConfig
    ) -> dict[str, str]:
        """The key of each set."""
        layout, longest = template.fingerprint(), config.max_new_tokens
        return {name: cache_key(self.model, layout, group, longest, self.arithmetic) for name, group in rows.items()}


def _rows(
    sets: Mapping[str, Sequence[Mapping[str, Any]]], fmt: FormatConfig, config: EvaluationConfig
) -> dict[str, list[EvaluationRow]]:
    return {name: evaluation_rows(name, raw[: config.max_rows], fmt) for name, raw in sets.items()}


def _table(
    rows: Mapping[str, Sequence[EvaluationRow]],
    template: Template,
    config: EvaluationConfig,
    label: str,
    reveal_text: bool,
    store: Store | None,
    run: Run,
) -> pa.Table:
    """The values of all sets, from the store if it has them."""
    keys: dict[str, str] = {}
    if store is not None:
        keys = store.keys(rows, template, config)
        cache = EvaluationCache(store.folder)
    tables: dict[str, pa.Table] = {}
    for name, key in keys.items():
        stored = None if reveal_text and is_private(name) else cache.load(key)
        if stored is not None:
            tables[name] = stored
    missing = {name: rows[name] for name in rows if name not in tables}
    for name, measured in _measure(missing, template, config.batch_size, label, run):
        if name in keys:
            cache.save(keys[name], measured)
        tables[name] = measured
    table = with_row_metrics(pa.concat_tables(tables[name] for name in rows))
    return table if reveal_text else without_private_text(table)


def _measure(
    rows: Mapping[str, Sequence[EvaluationRow]],
    template: Template,
    batch_size: int,
    label: str,
    run: Run,
) -> Iterator[tuple[str, pa.Table]]:
    """(set, table) as soon as the last unit of the set is done."""
    units = [unit for group in rows.values() for unit in plan(group, template, batch_size)]
    if not units:
        return
    results: dict[str, list[Result]] = {name: [] for name in rows}
    waiting = {name: sum(unit.set == name for unit in units) for name in rows}
    with progress.bar(f"evaluate {label}", len(units), "batch") as bar:
        for number, result in run(units):
            name = units[number].set
            results[name].append(result)
            waiting[name] -= 1
            bar.update()
            if waiting[name] == 0:
                yield name, assemble(rows[name], results.pop(name))


def _tokenizer(folder: str, trust_remote_code: bool) -> Any:
    return load_tokenizer(ModelConfig(path=folder, trust_remote_code=trust_remote_code), "tokenizer")
