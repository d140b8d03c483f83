"""From a command line to a checked configuration: jsonargparse over the dataclasses of ofmu_ray.config."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from ofmu_ray.commandline import help
from ofmu_ray.commandline.config_files import ConfigFile, read_files, runs_as_base, sections, with_shipped
from ofmu_ray.commandline.plain_words import plain_words
from ofmu_ray.config import METHODS, PRESETS, EvaluationConfig, SweepConfig, flatten, to_dict
from ofmu_ray.config.values import close_option
from ofmu_ray.config.yaml_keys import with_text_keys
from ofmu_ray.errors import UserError
from ofmu_ray.internals.jsonargparse_private import index_options

Config = TypeVar("Config")
FLAGS = ("--overwrite", "--peer_names")
USUAL = get_loader("yaml")
SHORT = {"--push-to-hub": "--export.push_to_hub", "--peer-names": "--peer_names"}


class PlainParser(argparse.ArgumentParser):
    """For commands whose options are no configuration: a mistake is a UserError, and options are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@functools.cache  # half a second of CPU time; tests and job submission parse several times
def parser_for(config_class: type[Any], prog: str, described: bool = True) -> ArgumentParser:
    """A parser whose options are the fields of `config_class`, nested ones with dots.

    Args:
        described: Read the options' descriptions, for help; this doubles the CPU time.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=described)
    set_loader("yaml", lambda text: USUAL(with_text_keys(text)), (yaml.YAMLError,))
    parser = ArgumentParser(prog=prog, description=config_class.__doc__, exit_on_error=False, allow_abbrev=False)
    index_options(parser)
    parser.add_argument("--config", action="config", help="YAML file; later files and options override earlier ones.")
    parser.add_class_arguments(config_class)
    if any(field.name == "base" for field in dataclasses.fields(config_class)):
        # of the default run, `auto` has become the built-in rows, which are not those of the user's data
        auto = {name: value for name, value in flatten(to_dict(EvaluationConfig())).items() if value == "auto"}
        parser.set_defaults({f"base.evaluation.{name}": value for name, value in auto.items()})
    return parser


def parse(config_class: type[Config], arguments: Sequence[str], prog: str) -> Config:
    """The configuration of a command line; `--print_config` and `--help` print and exit with 0.

    A preset (`ofmu.preset`) changes the defaults, so options in a file or on the command line still override it.

    Raises:
        UserError: unknown option (names the closest one), wrong type, value out of range, an option of a method that
            is not chosen, a missing or doubtful file.
    """
    kind: Any = config_class
    topic = help.asked(arguments)
    described = topic is not None or any(word.startswith("--print_config") for word in arguments)
    parser = parser_for(kind, prog, described)
    if topic is not None:
        help.show(parser, topic)
    known = [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]
    arguments = with_shipped(arguments)
    arguments = [word for index, word in enumerate(arguments) for word in _with_value(arguments, index)]
    files = read_files(arguments, sections(kind))
    for file in files:
        _refuse_empty(file, known)
    if kind is SweepConfig:
        arguments = runs_as_base(arguments, files)
    try:
        # print_config would print the defaults of the wrong preset, so presets are parsed without it
        plain = [word for word in arguments if not word.startswith("--print_config")]
        namespace = parser.parse_args(plain)
        defaults = _preset_defaults(namespace)
        if len(plain) < len(arguments) or any(parser.get_default(name) != value for name, value in defaults.items()):
            parser.set_defaults(defaults)
            namespace = parser.parse_args(list(arguments))
        built = vars(parser.instantiate(namespace))
    except argparse.ArgumentError as error:
        raise UserError(plain_words(str(error), known)) from None
    except ValueError as error:
        # an optional section (model.lora) is a union for jsonargparse, which embeds the section's message
        if isinstance(error, UserError) or not (reason := re.search(r"- (\S+ = .*: must be .*)", str(error))):
            raise
        raise UserError(reason[1]) from None
    built.pop("config", None)
    built.pop("__path__", None)
    config = config_class(**built)
    _refuse_unused(config, arguments, files)
    return config


def configured(config_class: type[Config], given: Any) -> Config:
    """A configuration as it is; or from a mapping or the path of a YAML file, as `--config` reads it.

    Raises:
        UserError: like `parse`; or `given` is nothing of these.
    """
    if isinstance(given, config_class):
        return given
    if isinstance(given, Mapping):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mapping.yaml"
            path.write_text(yaml.safe_dump(json.loads(json.dumps(dict(given), default=str))), encoding="utf-8")
            return configured(config_class, path)
    if isinstance(given, str | PathLike):
        return parse(config_class, ["--config", str(given)], config_class.__name__)
    raise UserError(
        f"config is of type {type(given).__name__}: give a {config_class.__name__}, a mapping of options or the path "
        "of a YAML file"
    )


def _with_value(words: Sequence[str], index: int) -> list[str]:
    """A flag alone means true; some options have a short form."""
    name, equals, value = words[index].partition("=")
    name = SHORT.get(name, name)
    alone = name in FLAGS and not equals and (index + 1 == len(words) or words[index + 1].startswith("-"))
    return [name, "true"] if alone else [f"{name}{equals}{value}"]


def _refuse_unused(config: Any, words: Sequence[str], files: Sequence[ConfigFile]) -> None:
    """UserError for options of a method that is not chosen.

    A file may have sections for several methods if `method` is given, here or there.
    """
    unused: frozenset[str] = getattr(config, "unused_sections", frozenset())
    names = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    if "method" not in names and not any("method" in file.keys for file in files):
        names += [key for file in files for key in file.keys]
    wrong = next((name for name in names if name.partition(".")[0] in unused), None)
    if wrong is not None:
        method = wrong.partition(".")[0]
        raise UserError(
            f"{wrong}: an option of the method {method}, but method = {config.method}: add --method {method}, or "
            f"remove {wrong}"
        )


def _preset_defaults(namespace: Any) -> dict[str, Any]:
    """All options set by any preset of a method, with the chosen preset's values: the cached parser may have the
    defaults of another one."""
    defaults: dict[str, Any] = {}
    for method, presets in PRESETS.items():
        chosen = getattr(getattr(namespace, method, None), "preset", None)
        if chosen is not None:
            plain = {field.name: field.default for field in dataclasses.fields(METHODS[method])}  # type: ignore[arg-type]
            names = {name for options in presets.values() for name in options}
            defaults |= {f"{method}.{name}": presets[chosen].get(name, plain[name]) for name in sorted(names)}
    return defaults


def _refuse_empty(file: ConfigFile, known: list[str]) -> None:
    """UserError for an unknown option whose value in a file is {}: jsonargparse silently drops those."""

    def look(content: Any, prefix: str) -> None:
        for key, value in content.items() if isinstance(content, dict) else ():
            name = f"{prefix}{key}"
            if value == {} and not any(option == name or option.startswith(f"{name}.") for option in known):
                raise UserError(
                    f"unknown option {name} in the configuration.{close_option(name, known)} All options: --help all"
                )
            if name not in known or any(
                option.startswith(f"{name}.") for option in known
            ):  # not the value of an option
                look(value, f"{name}.")

    look(file.content, "")


def fail(error: UserError | KeyboardInterrupt, prog: str) -> int:
    """Print a user's mistake, a storage error or an interruption, as all commands do; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{prog}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    print(f"{prog}: error: {error}", file=sys.stderr)
    return error.status
