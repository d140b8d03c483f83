"""Private APIs of jsonargparse: how it finds the option of a name."""

from __future__ import annotations

import functools
import importlib
from typing import Any
from weakref import WeakKeyDictionary

from ofmu_ray.internals.contract import Private

_PURPOSE = "finding options by name instead of looking through all of them"
_FINDER = "find_action_and_subcommand"

FINDER = Private("jsonargparse._subcommands", _FINDER, _PURPOSE)
PARSERS_FINDER = Private("jsonargparse._core", _FINDER, _PURPOSE)
SUBCOMMANDS = Private("jsonargparse._subcommands", "ActionSubCommands", _PURPOSE)
WITHOUT_VALUE = Private("jsonargparse._actions", "non_parsing_actions", _PURPOSE)
LOADS_A_CLASS = Private("jsonargparse._actions", "_ActionConfigLoad", _PURPOSE)
FAILS = Private("jsonargparse._actions", "ActionFail", _PURPOSE)

_indexes: WeakKeyDictionary[Any, tuple[int, dict[str, list[Any]]]] = WeakKeyDictionary()


def index_options(parser: Any) -> None:
    """Have jsonargparse find the options of a parser without subcommands in a dictionary.

    It looks through all options for each, which with 600 of them is four fifths of the time of parsing and a fifth of
    that of adding them. Other parsers in this process, and releases that no longer have these names, keep the usual
    way.
    """
    try:
        usual, subcommands = FINDER.get(), SUBCOMMANDS.get()
        without_value, last_choice = WITHOUT_VALUE.get(), (LOADS_A_CLASS.get(), FAILS.get())
        patched = PARSERS_FINDER.get() is usual and hasattr(usual, "__wrapped__")
    except AssertionError:
        return
    assert not any(isinstance(action, subcommands) for action in parser._actions)
    index: dict[str, list[Any]] = {}
    for action in parser._actions:
        if not isinstance(action, without_value):
            for name in {action.dest, *(option[2:] for option in action.option_strings if option.startswith("--"))}:
                index.setdefault(name, []).append(action)
    _indexes[parser] = len(parser._actions), index
    if patched:
        return

    @functools.wraps(usual)
    def find(parser: Any, dest: str, exclude: Any = ()) -> tuple[Any, str | None]:
        parser = getattr(parser, "parser", parser)  # of a group, which has the same list of options
        if parser not in _indexes:
            found: tuple[Any, str | None] = usual(parser, dest, exclude)
            return found
        if _indexes[parser][0] != len(parser._actions):
            index_options(parser)
        actions = [one for one in _indexes[parser][1].get(dest, ()) if not isinstance(one, exclude or ())]
        chosen = [one for one in actions if not isinstance(one, last_choice)][:1] or actions[-1:]
        return (chosen[0] if chosen else None), None

    for private in (FINDER, PARSERS_FINDER):
        setattr(importlib.import_module(private.module), private.name, find)
