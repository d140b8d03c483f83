"""A finished evaluation whose inputs have not changed is shown again, without torch, MLflow or Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ofmu_ray
from ofmu_ray.assets import PREFIX, resolve_builtin
from ofmu_ray.config import flatten, to_dict
from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.models.source import adapter_base
from ofmu_ray.storage import atomic_write, is_file, is_uri, join, read_text

RECORD = "evaluated.json"
RESULTS = ("metrics.json", "report.html", "rows.parquet")
_WORDS = ("name", "storage", "tracking", "report", "data.root", "data.format")
"""Options and sections that name no input."""


def inputs_digest(config: EvaluateConfig) -> str | None:
    """Hash of options, code and local files (path, size, time of change); None: an input may lie elsewhere."""
    if config.data.root and is_uri(config.data.root):
        return None
    models = [*config.models.values(), *filter(None, (config.evaluation.retrained, config.tokenizer))]
    options = flatten(to_dict(config))
    inputs = {name: value for name, value in options.items() if not name.startswith(_WORDS)}
    found = [_model_files(path) for path in models]
    found += [_files(text, config.data.root) for text in _texts(inputs)]
    if None in found:
        return None
    package = Path(ofmu_ray.__file__).parent
    code = _stamps(package, "*.py") + _stamps(package, "*.j2")
    content = json.dumps([to_dict(config), found, code], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_finished(home: str, digest: str | None) -> dict[str, Any] | None:
    """What `keep_finished` wrote, with `metrics`: the content of metrics.json. None: no such results."""
    if digest is None or not all(is_file(join(home, name)) for name in (RECORD, *RESULTS)):
        return None
    kept: dict[str, Any] = json.loads(read_text(join(home, RECORD)))
    if kept["digest"] != digest:
        return None
    return kept | {"metrics": json.loads(read_text(join(home, "metrics.json")))}


def keep_finished(home: str, digest: str | None, **shown: Any) -> None:
    """Mark the results in `home` as whole, with what is shown beside them."""
    atomic_write(join(home, RECORD), json.dumps({"digest": digest, **shown}) + "\n")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _model_files(path: str) -> list[Any] | None:
    """The files of a model, and of its base if it is an adapter alone."""
    stamps = _files(path, None)
    base = adapter_base(resolve_builtin(path)) if stamps else None
    if base is not None:
        more = _model_files(base)
        return None if more is None or stamps is None else stamps + more
    return stamps or None


def _files(text: str, root: str | None) -> list[Any] | None:
    """The files that an option may mean; none if it is a word; None: perhaps a URI or a name on the hub."""
    if not text:
        return []
    if text.startswith(PREFIX):
        return _stamps(Path(resolve_builtin(text)))
    if is_uri(text):
        return None
    stamps = _stamps(Path(text)) + (_stamps(Path(root) / text) if root else [])
    return None if not stamps and any(mark in text for mark in "/:*") else stamps


def _stamps(path: Path, pattern: str = "*") -> list[Any]:
    paths = [path] if path.is_file() else sorted(path.rglob(pattern)) if path.is_dir() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in paths if file.is_file()]
