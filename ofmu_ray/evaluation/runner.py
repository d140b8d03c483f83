"""The evaluation of a model directory: the same code, and the same numbers, within a run and on its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ofmu_ray.config import EvaluationConfig, FormatConfig
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.actors import Loading, device_kind, run_units
from ofmu_ray.evaluation.cache import EvaluationCache, cache_key, model_fingerprint, weights_folder
from ofmu_ray.evaluation.rows import EvaluationRow, evaluation_rows, is_private, with_row_metrics, without_private_text
from ofmu_ray.evaluation.scorer import Result, Unit, assemble, plan
from ofmu_ray.evaluation.summary import summarise

__all__ = ["evaluate_model", "summarise"]


def evaluate_model(
    model_dir: str | Path,
    tokenizer_dir: str | Path,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    fmt: FormatConfig,
    config: EvaluationConfig,
    storage_cache_dir: str | Path,
    *,
    label: str,
    reveal_text: bool = False,
    trust_remote_code: bool = False,
) -> pa.Table:
    """Per-row values of a model on each set, for `summarise`, the report and `rows.parquet`.

    `model_dir`, `tokenizer_dir`: folders that every node can read, or hub names.
    `sets`: name -> rows in TOFU's layout, of which the first `config.max_rows` count; rows are named `<set>-<index>`.
    `storage_cache_dir`: local path; a set that stands in its cache is not run again. `label` stands beside the
    progress bar. Columns: `rows.MEASURED`, `probability`, `truth_ratio`. `generated` is null for forget rows unless
    `reveal_text`, which runs them anew, because the cache never holds their text.

    Raises UserError for rows that cannot be evaluated and for folders without a model or a tokenizer.
    """
    rows = {name: evaluation_rows(name, found[: config.max_rows], fmt) for name, found in sets.items()}
    loading = loading_of(
        model_dir,
        tokenizer_dir,
        fmt,
        max_new_tokens=config.max_new_tokens,
        trust_remote_code=trust_remote_code,
    )
    keys = _keys(rows, model_fingerprint(weights_folder(str(model_dir))), loading)
    cache = EvaluationCache(Path(storage_cache_dir))
    tables: dict[str, pa.Table] = {}
    for name, key in keys.items():
        found = None if reveal_text and is_private(name) else cache.load(key)
        if found is not None:
            tables[name] = found
    missing = {name: rows[name] for name in rows if name not in tables}
    for name, measured in _measure(missing, loading, config, label):
        cache.save(keys[name], measured)
        tables[name] = measured
    table = with_row_metrics(pa.concat_tables(tables[name] for name in rows))
    return table if reveal_text else without_private_text(table)


def loading_of(
    model_dir: str | Path,
    tokenizer_dir: str | Path,
    fmt: FormatConfig,
    *,
    max_new_tokens: int,
    trust_remote_code: bool = False,
) -> Loading:
    """How every process comes by this model. UserError for folders without a model or a tokenizer."""
    tokenizer = _tokenizer(str(tokenizer_dir), trust_remote_code)
    weights = weights_folder(str(model_dir))
    return Loading(
        model=str(model_dir),
        weights_bytes=sum(path.stat().st_size for path in weights.glob("*.safetensors")),
        tokenizer=tokenizer,
        template=Template(tokenizer, fmt),
        max_new_tokens=max_new_tokens,
        trust_remote_code=trust_remote_code,
    )


def _keys(rows: Mapping[str, Sequence[EvaluationRow]], model: str, loading: Loading) -> dict[str, str]:
    arithmetic = "cuda/stored" if device_kind() == "cuda" else "cpu/fp32"
    template = loading.template.fingerprint()
    return {name: cache_key(model, template, of, loading.max_new_tokens, arithmetic) for name, of in rows.items()}


def _measure(
    rows: Mapping[str, Sequence[EvaluationRow]], loading: Loading, config: EvaluationConfig, label: str
) -> Any:
    """(set, table) as soon as the last unit of the set is done."""
    from tqdm import tqdm

    units: list[Unit] = [
        unit for of in rows.values() for unit in plan(of, loading.template, batch_size=config.batch_size)
    ]
    if not units:
        return
    results: dict[str, list[Result]] = {name: [] for name in rows}
    waiting = {name: sum(unit.set == name for unit in units) for name in rows}
    progress = tqdm(total=len(units), desc=f"evaluate {label}", unit="batch", disable=not sys.stderr.isatty())
    with progress:
        for number, result in run_units(units, loading, config.actors):
            name = units[number].set
            results[name].append(result)
            waiting[name] -= 1
            progress.update()
            if waiting[name] == 0:
                yield name, assemble(rows[name], results.pop(name))


def _tokenizer(folder: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load a tokenizer from {folder}: {reason}") from None
