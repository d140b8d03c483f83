"""`ofmu schema` and `ofmu completion`: what editors and shells need to complete options.

The completion script is text, written once: a shell that asked Python at every tab would wait for its imports.
"""

from __future__ import annotations

import importlib
import json
import typing
from collections.abc import Iterable, Mapping
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
BASH = """\
# completion of `ofmu`, written by `ofmu completion {shell}`
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
ZSH = """\
autoload -U +X compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""
FISH = """\
# completion of `ofmu`, written by `ofmu completion {shell}`
function __ofmu
  set -l given (commandline -opc)
  set -l words
  if test (count $given) -lt 2
    set words {commands}
  else
    switch "$given[2] $given[-1]"
      case "* --config"; set words {shipped}
      case "show *" "report *"; set words (ls runs 2>/dev/null) --storage --open
{choices}
      case {flags}
      case "* --*"; __fish_complete_path (commandline -ct); return
    end
    if test (count $words) -eq 0
      switch $given[2]
{options}
      end
    end
  end
  printf "%s\\n" $words
end
complete -c ofmu -f -a "(__ofmu)"
"""
SYNTAX = {
    "bash": ('*" {}"', "|", '{indent}{patterns}) words="{words}" ;;'),
    "fish": ('"* {}"', " ", "{indent}case {patterns}; set words {words}"),
}
"""A pattern that ends with an option; what stands between patterns; a case. zsh reads bash's."""


def configuration(command: str) -> type[Any]:
    """The class of a command's configuration."""
    module, _, name = CONFIGURATIONS[command].partition(":")
    kind: type[Any] = getattr(importlib.import_module(module), name)
    return kind


def script(commands: Mapping[str, Any], shell: str = "bash") -> str:
    """The completion script; `commands`: the names of all commands; `shell`: bash, zsh or fish."""
    options, limited = dict[str, list[str]](), dict[str, list[str]]()
    last, between, case = SYNTAX["fish" if shell == "fish" else "bash"]
    for command in CONFIGURATIONS:
        kind: Any = configuration(command)
        parser = parser_for(kind, f"ofmu {command}")
        known = [word for word in parser._option_string_actions if word.startswith("--")]
        names = [command, "quickstart"] if command == "unlearn" else [command]
        options[" ".join([*(word for word, name in SHORT.items() if name in known), *known])] = names
        for word in known:
            if values := _values(word, parser._option_string_actions[word]):
                limited.setdefault(" ".join(values), []).append(last.format(word))

    def cases(patterns: Mapping[str, Iterable[str]], indent: int) -> str:
        lines = (between.join(dict.fromkeys(names)) for names in patterns.values())
        return "\n".join(
            case.format(indent=" " * indent, patterns=names, words=words)
            for names, words in zip(lines, patterns, strict=True)
        )

    flags = [last.format(word) for word in (*ALONE, *SHORT) if SHORT.get(word, word) in ALONE]
    text = (FISH if shell == "fish" else BASH).format(
        shell=shell,
        commands=" ".join(commands),
        flags=between.join(flags),
        shipped=" ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml"))),
        choices=cases(limited, 6),
        options=cases(options, 8),
    )
    return ZSH + text if shell == "zsh" else text


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
    else:
        parser.add_argument("shell", nargs="?", default="bash", choices=["bash", "zsh", "fish"], help="default: bash")
    try:
        options = parser.parse_args(arguments)
    except UserError as error:
        return fail(error, parser.prog)
    if command == "schema":
        print(json.dumps(schema_of(configuration(options.command)), indent=1))
    else:
        print(script(commands, options.shell), end="")
    return 0
