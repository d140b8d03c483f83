"""Rows that are chats, in the shapes people have them, as turns {role, content}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ofmu_ray.config import FormatConfig
from ofmu_ray.data import row_checks as checks
from ofmu_ray.data.row_checks import Problems

ASSISTANT = "assistant"
ROLES = {"human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT}
"""ShareGPT's names for roles -> those of chat templates; others are kept."""
SHAREGPT, PROMPT, COMPLETION = "conversations", "prompt", "completion"


class Chat(NamedTuple):
    """A chat, and the index of the first turn that may have a loss."""

    turns: list[dict[str, str]]
    first: int

    @property
    def answers(self) -> list[int]:
        """The assistant's turns that have a loss."""
        return [at for at in range(self.first, len(self.turns)) if self.turns[at]["role"] == ASSISTANT]


def chat_of(row: Mapping[str, Any], fmt: FormatConfig, problems: Problems, place: str) -> Chat | None:
    """The chat of a row, or None after adding its problems.

    Its columns, the first that is there: `data.format.messages`; `conversations` (ShareGPT: from, value); `prompt` and
    `completion` (TRL: texts, or lists of turns; only the completion has a loss).
    """
    column = fmt.messages if fmt.messages in row else SHAREGPT
    if row.get(column) is not None:
        chat = Chat(_turns(row[column], column, problems, place), 0)
    elif row.get(PROMPT) is not None and row.get(COMPLETION) is not None:
        parts = []
        for name, role in ((PROMPT, "user"), (COMPLETION, ASSISTANT)):
            turns = [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
            parts.append(_turns(turns, name, problems, place))
        chat = Chat([turn for part in parts for turn in part], len(parts[0]))
    else:
        checks.cell(row, fmt.messages, "data.format.messages", problems, place)
        return None
    if not all(chat.turns):
        return None
    if not chat.answers:
        problems.add("no turn of the assistant", place)
        return None
    if chat.answers[0] == 0 and not fmt.system_prompt:
        problems.add("the first turn is the assistant's, so it answers nothing: remove it, or put a turn before", place)
        return None
    return chat


def _turns(cell: Any, column: str, problems: Problems, place: str) -> list[dict[str, str]]:
    """The turns in a cell; an unusable one is empty, after adding its problem."""
    if not isinstance(cell, list):
        problems.add(f"{type(cell).__name__} instead of a list of turns in column {column!r}", place)
        return [{}]
    return [_turn(turn, f"turn {number} of {column!r}", problems, place) for number, turn in enumerate(cell, start=1)]


def _turn(turn: Any, where: str, problems: Problems, place: str) -> dict[str, str]:
    role, content = (_first(turn, names) for names in (("role", "from"), ("content", "value")))
    if not isinstance(role, str):
        problems.add(f"{where} has no role", place)
        return {}
    role = ROLES.get(role, role)
    text = _text(content)
    if text is None:
        problems.add(f"{where} has no text", place)
        return {}
    if not checks.encodable(text):
        problems.add(f"half of a surrogate pair in {where}", place)
        return {}
    return {"role": role, "content": text}


def _first(turn: Any, names: Sequence[str]) -> Any:
    if not isinstance(turn, Mapping):
        return None
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _text(content: Any) -> str | None:
    """A turn's text; of several parts, those of type text ([{"type": "text", "text": ...}])."""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        content = None if None in parts else "\n".join(map(str, parts))
    return content if isinstance(content, str) and content.strip() else None
