"""`ofmu requests`: take in requests to forget, work them off, and prove it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.errors import UserError
from ofmu_ray.progress import listening
from pipelines import requests_intake, requests_service, requests_work
from pipelines.parse import fail, parse
from pipelines.terminal import Terminal

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, 2 for a user's mistake, 1 for a failure (audit: problems found; another processor at work)."""
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
        parser = _Parser(prog=prog, description=command.help, allow_abbrev=False)
        parser.epilog = "All options of `ofmu unlearn` and of section requests can be given too, or --config FILE."
        command.declare(parser)
        options, rest = parser.parse_known_args(words[1:])
        with listening(Terminal()):
            return command.run(options, parse(RequestsConfig, rest, PROG))  # one parser for all: it takes a second
    except (UserError, KeyboardInterrupt) as error:
        return fail(error, f"{PROG} {words[0]}")


if __name__ == "__main__":
    sys.exit(main())
