"""The model card (README.md) of an exported model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofmu_ray.reporting import formats
from ofmu_ray.storage import PathLike, atomic_write, join
from ofmu_ray.tasks import task_named

_KINDS = {"text-generation": "A language model", "image-classification": "An image classifier"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(
    folder: PathLike,
    *,
    name: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    config_hash: str | None = None,
    rounds: int | None = None,
) -> None:
    """Write `folder`/README.md: where the model comes from, its method and options, data digests and metrics.

    The card names rows by count and digest only and contains no row's text. Metrics may be absent: the card can be
    written at export and again after the evaluation.

    Args:
        config: the complete configuration, nested.
        metrics: ``before``, ``after``, ``retrained`` as in metrics.json.
        data: the data report.
        rounds: number of rounds done.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ofmu_ray", "reporting"),
        autoescape=False,  # Markdown; the values are options and numbers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    method = str(config.get("method") or "finetune")
    rows = formats.metric_table(metrics or {})
    text = environment.get_template("card.md.j2").render(
        name=name,
        front=_front_matter(config, method),
        method=method,
        kind=_KINDS.get(_pipeline_tag(config), "A model"),
        base=(config.get("model") or {}).get("path"),
        options=_yaml({method: config[method]} if method in config else {}),
        seed=config.get("seed"),
        training=config.get("training") or {},
        engine=formats.engine_name(config.get("training") or {}),
        precision=(config.get("model") or {}).get("precision"),
        rounds=rounds,
        config_hash=config_hash,
        streams=dict((data or {}).get("streams") or {}),
        rows=rows,
        models=[model for model in formats.MODELS if (metrics or {}).get(model)],
    )
    atomic_write(join(folder, "README.md"), text)


def _pipeline_tag(config: Mapping[str, Any]) -> str:
    tag: str = getattr(task_named(config["task"]), "pipeline_tag", "")
    return tag


def _front_matter(config: Mapping[str, Any], method: str) -> str:
    unlearned = method != "finetune"
    front: dict[str, Any] = {
        "library_name": "transformers",
        **({"pipeline_tag": tag} if (tag := _pipeline_tag(config)) else {}),
        "tags": ["ofmu-ray", *(["machine-unlearning", method] if unlearned else [])],
    }
    base = str((config.get("model") or {}).get("path") or "")
    # the hub refuses a card whose base_model is not a hub name
    if _HUB_NAME.fullmatch(base) and not Path(base).exists():
        front |= {"base_model": base, "base_model_relation": "finetune"}
    return _yaml(front)


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)) if values else ""
