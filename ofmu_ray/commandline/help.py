"""`--help` on one screen: what most people need, then the sections; `--help SECTION` and `--help all` show the rest."""

from __future__ import annotations

import shutil
import sys
import textwrap
from argparse import SUPPRESS
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from ofmu_ray.config import METHODS, close_match
from ofmu_ray.errors import UserError

COMMON = (
    "model.path",
    "model.lora.rank",
    "model.precision",
    "data.root",
    "data.forget.path",
    "data.retain.path",
    "data.train.path",
    "data.format.kind",
    "evaluation.retrained",
    "training.workers",
    "training.gpus_per_worker",
    "training.rounds",
    "training.batch_size",
    "training.zero_stage",
    "ofmu.preset",
    "budget.flops",
    "trials",
)
"""Options of sections that the short help shows, where a command has them."""
INDENT = 28


def asked(words: Sequence[str]) -> str | None:
    """What a command line wants help on: "" for the short help, a section, or "all"; None: no help."""
    for index, word in enumerate(words):
        if word in ("-h", "--help"):
            following = words[index + 1 : index + 2]
            return following[0] if following and not following[0].startswith("-") else ""
    return None


def text(parser: ArgumentParser, topic: str) -> str:
    """The help on a topic.

    Raises:
        UserError: there is no such section; suggests the closest.
    """
    if topic == "all":
        return str(parser.format_help())
    options, sections = _options(parser), _sections(parser)
    if topic:
        chosen = {name: action for name, action in options.items() if name.startswith(f"{topic}.") or name == topic}
        if not chosen:
            hint = close_match(topic, [*sections, "all"])
            raise UserError(f"--help {topic}: no such section.{hint} Sections: {', '.join(sections)}, all")
        return "\n".join([sections.get(topic, topic), *(_option(name, action) for name, action in chosen.items())])
    top = [name for name in options if "." not in name]
    lines = [
        f"usage: {parser.prog} [--config FILE] [--section.option VALUE ...]",
        "",
        *_wrapped(parser.description),
        "",
    ]
    lines += [_option(name, options[name], short=True) for name in (*top, *COMMON) if name in options]
    lines += ["", "More options: --help SECTION, or --help all"]
    lines += [_entry(name, title) for name, title in sections.items() if name not in METHODS]
    methods = [name for name in sections if name in METHODS]
    lines += [_entry("a method", ", ".join(methods))] if methods else []
    return "\n".join(lines)


def show(parser: ArgumentParser, topic: str) -> None:
    """Print the help and exit with 0."""
    print(text(parser, topic))
    sys.exit(0)


def _options(parser: ArgumentParser) -> dict[str, Any]:
    return {
        word.removeprefix("--"): action
        for word, action in parser._option_string_actions.items()
        # argparse's own mark of an option not to be shown, such as jsonargparse's of the shell completion
        if word.startswith("--") and word != "--help" and action.help != SUPPRESS and not _is_section(action)
    }


def _sections(parser: ArgumentParser) -> dict[str, str]:
    """Top-level section -> its title."""
    titles = {}
    for group in parser._action_groups:
        for action in group._group_actions[:1]:
            if _is_section(action) and "." not in action.dest:
                titles[action.dest] = str(group.title)
    return titles


def _is_section(action: Any) -> bool:
    return type(action).__name__ == "_ActionConfigLoad"


def _option(name: str, action: Any, *, short: bool = False) -> str:
    """An option with its default; `short`: only the first sentence of its text."""
    default = action.default
    shown = "" if isinstance(default, str) and default.startswith("==") else f" [{_value(default)}]"
    words = " ".join(str(action.help).split())
    return _entry(f"--{name}", f"{words.partition('. ')[0] if short else words}{shown}")


def _value(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _entry(name: str, words: str) -> str:
    lines = _wrapped(words, INDENT)
    first = f"  {name:<{INDENT - 4}}  "
    if len(first) > INDENT:
        return "\n".join([first.rstrip(), *lines])
    return "\n".join([first + lines[0].strip(), *lines[1:]])


def _wrapped(words: str | None, indent: int = 0) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    prefix = " " * indent
    return textwrap.wrap(" ".join((words or "").split()), width, initial_indent=prefix, subsequent_indent=prefix) or [
        ""
    ]
