"""jsonargparse's messages about types, in one sentence that a user of options understands."""

from __future__ import annotations

import re

from ofmu_ray.config import close_match
from ofmu_ray.config.values import close_option

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list such as [a, b]",
    "tuple": "a list such as [a, b]",
    "dict": "options by name such as {a: b}",
    "NoneType": "null",
}
"""Python's type -> what a user writes."""


def plain_words(message: str, known: list[str]) -> str:
    """The message in the words of options and values, with the closest of the `known` options for a misspelt one."""
    message = " ".join(message.split())
    if match := re.search(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
        word = match[1].split("=")[0]
        return f"unknown option {word}.{close_option(word.lstrip('-'), known)} All options: --help all"
    if match := re.search(r"[Gg]roup '(.+?)' does not accept option '(.+?)'", message):
        word = f"{match[1]}.{match[2]}"
        return f"unknown option {word} in the configuration.{close_option(word, known)} All options: --help all"
    if match := re.search(r"Parser key \"(.+?)\":.*? Option '(.+?)' is not accepted", message):
        return f"unknown option {match[1]}.{match[2]} in the configuration. All options: --help all"
    if match := re.fullmatch(r"Option '(.+?)' is not accepted", message):
        return f"unknown option {match[1]} in the configuration.{close_option(match[1], known)} All options: --help all"
    if match := re.search(r"Parser key \"(.+?)\": Expected a typing\.Literal\[(.*?)\]\. Got value: (.+)", message):
        choices = [choice.strip("' ") for choice in match[2].split(",")]
        hint = close_match(match[3], choices)
        return f"{match[1]} = {match[3]}: no such choice.{hint} Use one of {', '.join(choices)}"
    if match := re.search(r"does not accept (?:nested )?(?:key|option)s? '(.+?)'", message):
        return f"unknown option {match[1]} in the configuration.{close_option(match[1], known)} All options: --help all"
    return _wrong_value(message, known) or message


def _wrong_value(message: str, known: list[str]) -> str | None:
    """`message` about a value of the wrong type; None: about something else."""
    keys = re.findall(r'Parser key "(.+?)":', message)
    if not keys:
        return None
    name = ".".join(dict.fromkeys(keys))
    if match := re.search(r"the following arguments are required: (.+)", message):
        return f"{name}: it lacks {match[1]}"
    inner = message.rpartition("Parser key ")[2]
    value = re.search(r"(?:Got value: |Given value: |load config \")(.+?)(?:\"?$| - Expected| Given value type)", inner)
    if value is None:
        return None
    kinds = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", inner[: value.start()])
    inside = [option.replace(".help", ".OPTION") for option in known if option.startswith(f"{name}.")]
    if inside and not any(kind in ("list", "dict", "tuple") for kind, _ in kinds):
        return f"{name} = {value[1]}: a section of options; give them one by one, such as --{inside[0]}"
    words = [KINDS.get(kind, kind) if kind else choices.replace("'", "") for kind, choices in kinds]
    return f"{name} = {value[1]}: must be {' or '.join(dict.fromkeys(words))}" if words else None
