"""Every `ofmu` command in the documents and in the comments of shipped configurations parses."""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from ofmu_ray.commandline.parse import PlainParser, parse
from ofmu_ray.config.submit import SubmitConfig
from ofmu_ray.errors import UserError
from pipelines import cli, editors, requests, submit

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGURATIONS = sorted((ROOT / "pipelines/configs").glob("*.yaml"))
COMMAND = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?ofmu ([a-z]+ .*|[a-z]+)$")
PLACEHOLDERS = re.compile(r"\[(--|options)|\.\.\.|…\s")
"""Of a synopsis, which nobody types."""

PLAIN = {"--config", "--data.root", "--base.data.root"}


@dataclass
class Shown:
    """A command of a page."""

    words: list[str]
    error: str = ""
    """The message that the page shows below it: a deliberate mistake."""


def commands_of(path: Path) -> Iterator[Shown]:
    """The commands in a page's blocks and in code within its sentences; of a YAML file, in its comments."""
    text = path.read_text()
    if path.suffix == ".yaml":
        comments = "\n".join(re.findall(r"^# ?(.*)$", text, re.MULTILINE))
        text = re.sub(r": (ofmu \w+ --.*)$", r"\n    \1", comments, flags=re.MULTILINE)
        text = re.sub(r"^ {2}", "    ", text, flags=re.MULTILINE)
    yield from (Shown(shlex.split(code)) for code in re.findall(r"`ofmu\s+([^`]*--[^`]*)`", text) if shown_whole(code))
    variables: dict[str, str] = {}
    lines = [*block_lines(text.replace("\\\n", " ")), ""]
    for line, below in pairwise(lines):
        if assigned := re.fullmatch(r"([A-Z])=\"(.*)\"", line):
            variables[assigned[1]] = assigned[2]
        if (command := COMMAND.match(line)) and shown_whole(command[1]):
            expanded = re.sub(r"\$([A-Z])\b", lambda name: variables[name[1]], command[1])
            words = shlex.split(re.split(r" [>|] ", expanded)[0], comments=True)
            yield Shown(words, below.partition(" error: ")[2])


def shown_whole(command: str) -> bool:
    return not PLACEHOLDERS.search(command.partition(" #")[0])


def block_lines(text: str) -> Iterator[str]:
    """Lines of indented and fenced blocks."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def without_files(words: list[str]) -> list[str]:
    """Without `--config` for files of the reader's; and for those that ship, which tests/test_cli.py parses, if the
    command adds nothing that depends on them."""
    kept, plain = list(words), {word for word in words if word.startswith("--")} <= PLAIN
    while "--config" in kept:
        at = kept.index("--config")
        name = kept[at + 1]
        if name.startswith("pipelines/") or not (name.endswith((".yaml", ".yml")) or name.isupper()):
            assert words[0] in commands_for(Path(name).stem), f"ofmu {shlex.join(words)}"
            kept[at : at + 2] = [] if plain else [f"--config={name}"]
        else:
            del kept[at : at + 2]
    return kept


def commands_for(name: str) -> tuple[str, ...]:
    """The commands that a shipped configuration is for."""
    path = ROOT / f"pipelines/configs/{name}.yaml"
    if not path.is_file():
        return ()
    first = name.partition("_")[0]
    usual = ("train",) if "\nfinetune:" in path.read_text() else ("unlearn", "plan", "submit")
    return (first,) if first in ("evaluate", "benchmark", "sweep", "requests") else usual


def parsed(words: Sequence[str]) -> None:
    """Parse as the command does. Raises UserError."""
    command, *options = words
    if command == "quickstart":
        command, options = "unlearn", ["--config=quickstart", *options]
    if command == "submit":
        own, job, rest = submit.split(options)
        parse(SubmitConfig, own, "ofmu submit")
        if job is not None:
            parse(submit.JOBS[job], rest, f"ofmu {job}")
    elif command == "requests":
        parser = PlainParser(prog="ofmu requests")
        requests.SUBCOMMANDS[options[0]].declare(parser)
        own, rest = requests._divided(parser, options[1:])
        parser.parse_args(own)
        parse(editors.configuration("requests"), rest, "ofmu requests")
    elif command in editors.CONFIGURATIONS:
        parse(editors.configuration(command), options, f"ofmu {command}")
    else:
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ParsedError):
            patch.setattr(PlainParser, "parse_args", only_parsed)
            raise SystemExit(cli.main([command, *options]))


class ParsedError(Exception):
    """In place of what a command does with its options."""


def only_parsed(parser: PlainParser, words: list[str]) -> None:
    super(PlainParser, parser).parse_args(words)
    raise ParsedError


@functools.cache
def mistake(*words: str) -> str:
    """What the command's parser says; empty if it accepts it."""
    try:
        parsed(words)
    except UserError as error:
        return str(error)
    except SystemExit as end:  # --help, --print_config
        return f"status {end.code}" if end.code else ""
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("path", [*PAGES, *CONFIGURATIONS], ids=lambda path: path.name)
def test_commands_of_a_page_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deliberate mistake gives the message that the page shows, if the parser is what notices it."""
    monkeypatch.chdir(ROOT)
    for shown in commands_of(path):
        message = mistake(*without_files(shown.words))
        if message:
            assert shown.error, f"ofmu {shlex.join(shown.words)}: {message}"
            assert message.startswith(shown.error[:60])


def test_commands_are_found() -> None:
    shown = [one for path in [*PAGES, *CONFIGURATIONS] for one in commands_of(path)]
    assert len(shown) > 80
    assert {"unlearn", "train", "evaluate", "sweep", "benchmark", "plan", "requests", "submit"} <= {
        one.words[0] for one in shown
    }
    assert any(one.error for one in shown)
    assert sum("--config" in one.words for one in shown) > 50


@pytest.mark.parametrize(
    "line",
    [
        "unlearn --training.round 40",
        "submit unlearn --sed 1",
        "requests add --kee x --rows y",
        "metrics tofu --logg x",
    ],
)
def test_a_renamed_option_is_noticed(line: str) -> None:
    assert mistake(*shlex.split(line))


@pytest.mark.parametrize("line", ["train --config pipelines/configs/gone.yaml", "evaluate --config tofu_target"])
def test_a_misspelt_file_and_another_command_s_are_noticed(line: str) -> None:
    with pytest.raises(AssertionError, match="--config"):
        without_files(shlex.split(line))
