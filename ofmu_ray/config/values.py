"""Configurations as plain values: dicts, flat names, hashes."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts (for JSON and YAML), without its unused sections."""
    unused: frozenset[str] = getattr(config, "unused_sections", frozenset())
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in unused}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}: the names that the command line and MLflow use."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


EXPORT_PLACES = ("max_shard_size", "push_to_hub", "hub_public")
WHERE_KEPT = ("name", "storage", "overwrite", "tracking", "report", *(f"export.{name}" for name in EXPORT_PLACES))
"""Options for where a run is stored and how it is shown."""

ELASTIC = tuple(
    f"training.{name}"
    for name in (
        *("workers", "cpus_per_worker", "gpus_per_worker", "micro_batch_size", "compile"),
        *("placement", "network_interface", "keep_checkpoints", "max_failures", "round_timeout", "node_timeout"),
    )
)
"""Options for machines and fault tolerance: they may change when a run is resumed."""


ADDED = {"task": "causal_lm", "overwrite": False, "peer_names": False, "export": {"dtype": "auto", "weights": "merged"}}
"""Options that were added later -> the earlier behaviour; with this value they do not change hashes."""
DATE = "2024-07-26"
"""Default of `data.format.date`."""
ADDED_WITHIN: dict[str, tuple[Any, ...]] = {
    "data.format.kind": ("qa",),
    "data.*.kind": (None,),
    "data.format.text": ("text",),
    "data.format.messages": ("messages",),
    "data.format.min_characters": (0,),
    "data.format.stride": (None,),
    "data.format.packed": (False,),
    "data.format.date": (DATE,),
    "data.truncate": ("retain", "allow"),
    "data.split": (None,),
    "data.test": (None,),
    "training.decay_norms": (True,),
    "training.compile": (False,),
    "ofmu.level_model": (None,),
    "*.milestones": ([0.5, 0.75],),
    "*.step_factor": (0.1,),
    "evaluation.engine": ("auto", "live", "process"),
    "evaluation.dtype": ("auto",),
    "evaluation.device_map": (None, "auto"),
    "evaluation.sets.test": (None,),
    "evaluation.sets.forget_choice": (None,),
    "evaluation.sets.retain_choice": (None,),
    "evaluation.sets.choice_scoring": ("letters",),
    **{f"evaluation.sets.*_{name}": (None,) for name in ("verbatim", "knowledge", "examples", "documents")},
}
"""The same inside sections, also of `base`: pattern of the flat name -> values. data.truncate refuses rows and changes
none; `allow` truncates them as before. Where an evaluation runs changes only its rounding."""


def config_hash(config: Any, *extra: str, ignore: Iterable[str] = WHERE_KEPT) -> str:
    """Hex digest (16 digits) of what determines a run: the config without its storage options, plus `extra`.

    `ignore`: names of sections and options (`section.option`).
    """
    ignored = set(ignore)
    content = {
        key: {name: item for name, item in value.items() if f"{key}.{name}" not in ignored}
        if isinstance(value, dict)
        else value
        for key, value in to_dict(config).items()
        if key not in ignored
    }
    content = {key: value for key, value in content.items() if key not in ADDED or value != ADDED[key]}
    text = json.dumps([without_added(content), *extra], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_added(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options without those that have a value of ADDED_WITHIN, or, of image classification, their defaults."""
    from ofmu_ray.config.images import ClassifierConfig, ImagesConfig

    images, classifier = dataclasses.asdict(ImagesConfig()), dataclasses.asdict(ClassifierConfig())
    earlier = ADDED_WITHIN | {"data.images": (images,), "classifier": (classifier,)}
    decays = any(value for name, value in flatten(content).items() if name.endswith(".weight_decay"))
    if "decay_norms" in content.get("training", {}) and not decays:  # without weight decay it changes nothing
        content = content | {"training": content["training"] | {"decay_norms": True}}
    kept = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        patterns = (form for form in earlier if fnmatchcase(name, form) or fnmatchcase(name, f"*.{form}"))
        if any(value in earlier[form] for form in patterns):
            continue
        kept[key] = without_added(value, f"{name}.") if isinstance(value, dict) else value
    return kept


def outcome_hash(config: Any, *extra: str) -> str:
    """`config_hash` of what determines the outcome of a run (except for rounding): also without its workers."""
    return config_hash(config, *extra, ignore=(*WHERE_KEPT, *ELASTIC))


def close_match(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a misspelt option, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""


def close_option(word: str, known: Sequence[str]) -> str:
    """A suggestion for a misspelt option, also in another section or without its section; or what its section has."""
    section, _, tail = word.rpartition(".")
    same_tail = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    if same_tail:
        return f" Did you mean {same_tail[0]}?"
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section and name[-1] != "+"]
    if section and 0 < len(siblings) <= 15 and not close_match(tail, siblings):
        return f" {section} has {', '.join(siblings)}."
    return close_match(word, known)
