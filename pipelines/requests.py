"""`ofmu requests`: take in requests to forget, work them off, and prove it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from ofmu_ray.commandline.parse import PlainParser, fail, parse
from ofmu_ray.commandline.terminal import Terminal
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.errors import UserError
from ofmu_ray.progress import listening
from pipelines import requests_intake, requests_service, requests_work

PROG = "ofmu requests"


@dataclass(frozen=True)
class Subcommand:
    """A word after `ofmu requests`: its own options, and what it does. All other options are configuration."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, RequestsConfig], int]
    """Prints results on stdout, returns the exit status, raises UserError."""


SUBCOMMANDS: dict[str, Subcommand] = {
    name: Subcommand(*parts)
    for table in (requests_intake.COMMANDS, requests_service.COMMANDS, requests_work.COMMANDS)
    for name, parts in table.items()
}


def _divided(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], list[str]]:
    """(the command's own words, the configuration's). An option of the configuration takes the word that follows it,
    which argparse would mistake for a positional argument."""
    own: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(words):
        name, mark, _ = words[position].partition("=")
        foreign = name.startswith("--") and name not in parser._option_string_actions
        following = words[position + 1 : position + 2]
        count = 2 if foreign and not mark and following and not following[0].startswith("--") else 1
        (rest if foreign else own).extend(words[position : position + count])
        position += count
    return own, rest


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, 2 for a user's mistake, 1 for a failure (such as problems that `audit` found)."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {PROG} COMMAND [options of the command] [--config FILE] [--requests.option VALUE ...]\n")
        print("\n".join(f"  {name:10} {one.help}" for name, one in SUBCOMMANDS.items()))
        return 0 if words else 2
    try:
        if words[0] not in SUBCOMMANDS:
            raise UserError(f"unknown command {words[0]!r}. Commands: {', '.join(SUBCOMMANDS)}")
        command = SUBCOMMANDS[words[0]]
        prog = f"{PROG} {words[0]}"
        parser = PlainParser(prog=prog, description=command.help)
        parser.epilog = "All options of `ofmu unlearn` and of section requests can be given too, or --config FILE."
        command.declare(parser)
        own, rest = _divided(parser, words[1:])
        options = parser.parse_args(own)
        with listening(Terminal()):
            return command.run(options, parse(RequestsConfig, rest, PROG))  # one parser for all: it takes a second
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, f"{PROG} {words[0]}")


if __name__ == "__main__":
    sys.exit(main())
