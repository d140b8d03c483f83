"""`ofmu schema` and `ofmu completion`: what editors and shells need to complete options.

The completion script is text, written once: a shell that asked Python at every tab would wait for its imports.
"""

from __future__ import annotations

import importlib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ofmu_ray.commandline.config_files import SHIPPED
from ofmu_ray.commandline.parse import FLAGS, SHORT, PlainParser, fail, parser_for
from ofmu_ray.config.json_schema import schema_of
from ofmu_ray.errors import UserError

CONFIGURATIONS = {
    "unlearn": "ofmu_ray.config:UnlearnConfig",
    "train": "ofmu_ray.config:TrainConfig",
    "evaluate": "ofmu_ray.config.evaluate:EvaluateConfig",
    "sweep": "ofmu_ray.config:SweepConfig",
    "benchmark": "ofmu_ray.config:BenchmarkConfig",
    "plan": "ofmu_ray.config.plan:PlanConfig",
    "requests": "ofmu_ray.config.requests:RequestsConfig",
}
"""Command -> where its configuration is declared."""
ALONE = (*FLAGS, "--help", "--open")
"""Options without a value."""
SCRIPT = """\
# bash completion of `ofmu`, written by `ofmu completion`
_ofmu() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" = 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}} $before" in
      *" --config") words="{shipped}" ;;
      "show "*|"report "*) words="$(ls runs 2>/dev/null) --storage --open" ;;
{choices}
      {flags}) ;;
      *" --"*) return ;;
    esac
    if [ -z "$words" ]; then
      case "${{COMP_WORDS[1]}}" in
{options}
      esac
    fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _ofmu ofmu
"""


def configuration(command: str) -> type[Any]:
    """The class of a command's configuration."""
    module, _, name = CONFIGURATIONS[command].partition(":")
    kind: type[Any] = getattr(importlib.import_module(module), name)
    return kind


def script(commands: Mapping[str, Any]) -> str:
    """The completion script; `commands`: the names of all commands."""
    options, limited = [], dict[str, list[str]]()
    for command in CONFIGURATIONS:
        kind: Any = configuration(command)
        parser = parser_for(kind, f"ofmu {command}")
        known = [word for word in parser._option_string_actions if word.startswith("--")]
        short = [word for word, name in SHORT.items() if name in known]
        options.append(_case([command, "quickstart"] if command == "unlearn" else [command], [*short, *known]))
        for word in known:
            if values := _values(word, parser._option_string_actions[word]):
                limited.setdefault(" ".join(values), []).append(f'*" {word}"')
    return SCRIPT.format(
        commands=" ".join(commands),
        flags="|".join(f'*" {word}"' for word in (*ALONE, *SHORT) if SHORT.get(word, word) in ALONE),
        shipped=" ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml"))),
        choices="\n".join(_case(dict.fromkeys(words), values.split(), 6) for values, words in limited.items()),
        options="\n".join(options),
    )


def _case(patterns: Iterable[str], words: Sequence[str], indent: int = 8) -> str:
    return f'{" " * indent}{"|".join(patterns)}) words="{" ".join(words)}" ;;'


def _values(word: str, action: Any) -> list[str]:
    """The values that an option is limited to."""
    hint = getattr(action, "_typehint", None)
    if hint is bool:
        return [] if word in FLAGS else ["true", "false"]
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else (hint,)
    literals = [kind for kind in kinds if typing.get_origin(kind) is typing.Literal]
    return [str(value) for kind in literals for value in typing.get_args(kind)]


def main(arguments: list[str], command: str, commands: Mapping[str, Any]) -> int:
    """Exit status 0, 2 for a user's mistake."""
    parser = PlainParser(prog=f"ofmu {command}", description=commands[command])
    if command == "schema":
        parser.add_argument("command", nargs="?", default="unlearn", choices=[*CONFIGURATIONS], help="default: unlearn")
    try:
        options = parser.parse_args(arguments)
    except UserError as error:
        return fail(error, parser.prog)
    if command == "schema":
        print(json.dumps(schema_of(configuration(options.command)), indent=1))
    else:
        print(script(commands), end="")
    return 0
