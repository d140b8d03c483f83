"""Configuration files, read strictly: what YAML would lose or accept in silence is an error that names the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ofmu_ray.config import LABELS, SweepConfig, UnlearnConfig, close_match
from ofmu_ray.config.yaml_keys import NULL, TEXT
from ofmu_ray.errors import UserError

EXAMPLE = "a configuration is YAML such as `training: {rounds: 40}`; --print_config prints all options"


@dataclass(frozen=True)
class ConfigFile:
    """A file of --config."""

    path: str
    node: yaml.MappingNode
    """Its content as YAML nodes: keys in order, scalars as written."""

    @property
    def content(self) -> dict[str, Any]:
        """Its content as plain values."""
        values: dict[str, Any] = yaml.safe_load(yaml.serialize(self.node, Dumper=yaml.SafeDumper))
        return values

    @property
    def keys(self) -> list[str]:
        """Its sections and options."""
        return [str(key.value) for key, _ in self.node.value]


def sections(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(name, whether it may be null) of a configuration's sections: what holds nothing but options by name."""
    for name, hint in get_type_hints(kind).items():
        union = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        choices = [choice for choice in union if choice is not type(None)]
        if len(choices) == 1 and is_dataclass(choices[0]):
            yield f"{prefix}{name}", len(choices) < len(union)
            yield from sections(choices[0], f"{prefix}{name}.")  # type: ignore[arg-type]


def config_paths(words: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(index of the word with the path, path) of every --config."""
    for index, word in enumerate(words):
        if word.startswith("--config="):
            yield index, word.removeprefix("--config=")
        elif word == "--config" and index + 1 < len(words):
            yield index + 1, words[index + 1]


SHIPPED = Path(str(files("pipelines") / "configs"))


def with_shipped(words: Sequence[str]) -> list[str]:
    """The words with `--config NAME` as the path of the shipped configuration NAME, unless a file has this name.

    Raises:
        UserError: there is neither; suggests the closest.
    """
    placed = list(words)
    for index, name in config_paths(words):
        if Path(name).exists() or Path(name).name != name or Path(name).suffix:
            continue
        path = SHIPPED / f"{name}.yaml"
        if not path.is_file():
            names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
            raise UserError(
                f"config = {name!r}: neither a file here nor a configuration that ships with this package."
                f"{close_match(name, names)} Those: {', '.join(names)}"
            )
        placed[index] = f"{'--config=' if words[index].startswith('--config=') else ''}{path}"
    return placed


def read_files(words: Sequence[str], sections: Iterable[tuple[str, bool]]) -> list[ConfigFile]:
    """The files of --config. `sections`: names whose content must be a mapping, and whether null will do.

    Raises:
        UserError: not there, not text, not YAML, empty, a key twice, or a list, text or nothing where options belong.
    """
    known = dict(sections)
    files = [read_file(path) for _, path in config_paths(words)]
    for file in files:
        _check_mappings(file.node, "", file.path, known)
    return files


def read_file(path: str) -> ConfigFile:
    """A file as nodes. Raises UserError like `read_files`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)  # refuses tags, and lists as keys
    except UnicodeDecodeError:
        raise UserError(f"config = {path!r}: not a text file; {EXAMPLE}") from None
    except OSError as error:
        raise UserError(f"config = {path!r}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"config = {path!r}{line}: not YAML ({getattr(error, 'problem', None) or 'unreadable'}); {EXAMPLE}"
        ) from None
    if node is None:
        raise UserError(f"config = {path!r}: the file has no options; {EXAMPLE}")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "one value"
        raise UserError(f"config = {path!r}: the file is {kind}, not options by name; {EXAMPLE}")
    return ConfigFile(path, node)


def _check_mappings(node: yaml.Node, name: str, path: str, sections: Mapping[str, bool]) -> None:
    """Refuse duplicate keys, and lists, text and nothing in the place of sections."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, option = key.start_mark.line + 1, f"{name}.{key.value}" if name else str(key.value)
            if option in lines:
                raise UserError(
                    f"config = {path!r}: {option} is there twice, in lines {lines[option]} and {line}; the first would "
                    "be lost: merge them"
                )
            lines[option] = line
            _check_mappings(value, option, path, sections)
    elif name in sections and not (node.tag == NULL and sections[name]):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "nothing" if node.tag == NULL else repr(node.value)
        raise UserError(
            f"config = {path!r}, line {node.start_mark.line + 1}: {name} is a section, so it must contain options by "
            f"name (`{name}: {{option: value}}`), not {kind}"
        )
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_mappings(item, f"{name}[]", path, sections)


# ------------------------------------------------------------------------------------- a run's file for `ofmu sweep`

SWEEP_ONLY = {field.name for field in fields(SweepConfig)} - {field.name for field in fields(UnlearnConfig)}
RUN_ONLY = {field.name for field in fields(UnlearnConfig)} - {field.name for field in fields(SweepConfig)}


def runs_as_base(words: Sequence[str], files: Iterable[ConfigFile]) -> list[str]:
    """The words of a sweep with the configuration of an `ofmu unlearn` run as its `base`.

    The run's method and preset become the sweep's label, its storage the sweep's; its name is not used.
    """
    placed = list(words)
    by_path = {file.path: file for file in files}
    for index, path in config_paths(words):
        file = by_path.get(path)
        if file is not None and RUN_ONLY & {*file.keys} and not SWEEP_ONLY & {*file.keys}:
            prefix = "--config=" if words[index].startswith("--config=") else ""
            placed[index] = prefix + yaml.serialize(_as_base(file.node), Dumper=yaml.SafeDumper)
    return placed


def _as_base(run: yaml.MappingNode) -> yaml.MappingNode:
    def text(value: str) -> yaml.ScalarNode:
        return yaml.ScalarNode(TEXT, value)

    entries: list[tuple[yaml.Node, yaml.Node]] = [
        (text("base"), _mapping(pair for pair in run.value if pair[0].value not in ("name", "storage")))
    ]
    entries += [(key, value) for key, value in run.value if key.value == "storage"]
    options = {key.value: value for key, value in run.value}
    method = options["method"].value if "method" in options else UnlearnConfig.method
    section = options.get(method)
    presets = [value.value for key, value in section.value if key.value == "preset"] if section is not None else []
    label = next((name for name in (*(f"{method}_{preset}" for preset in presets), method) if name in LABELS), None)
    if label is not None:
        entries.append((text("label"), text(label)))
    return _mapping(entries)


def _mapping(entries: Iterable[tuple[yaml.Node, yaml.Node]]) -> yaml.MappingNode:
    return yaml.MappingNode("tag:yaml.org,2002:map", list(entries))
