"""Chats as token ids: a row for each turn of the assistant, after the turns before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ofmu_ray.config import FormatConfig
from ofmu_ray.data.answer_encoder import AnswerEncoder, encoded_rows
from ofmu_ray.data.chats import COMPLETION, PROMPT, SHAREGPT, Chat, chat_of
from ofmu_ray.data.encoder import EncodedRow
from ofmu_ray.data.row_checks import Problems
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError

_CODE = ("chat_encoder.py", "answer_encoder.py", "chats.py", "template.py")


class ChatEncoder:
    """Encodes `input_ids` (the chat up to a turn of the assistant, EOS) and `prompt_tokens`, all before this turn.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    payload = AnswerEncoder.payload

    def __init__(self, template: Template, config: FormatConfig) -> None:
        template.check_chats()
        self.template, self.config = template, config

    @property
    def columns(self) -> Sequence[str]:
        return (self.config.messages,)  # where it is missing, all columns are read: SHAREGPT, or PROMPT and COMPLETION

    def fingerprint(self) -> str:
        code = [files("ofmu_ray.data").joinpath(name).read_text() for name in _CODE]
        names = [self.config.messages, SHAREGPT, PROMPT, COMPLETION]
        return hashlib.sha256(json.dumps([self.template.fingerprint(), names, *code]).encode()).hexdigest()

    def encode(
        self, rows: Sequence[tuple[str, Mapping[str, Any]]], problems: Problems
    ) -> Iterator[tuple[int, EncodedRow]]:
        places, prompts, answers, identities = [], [], [], []
        for index, (place, cells) in enumerate(rows):
            chat = chat_of(cells, self.config, problems, place)
            turns = [] if chat is None else self._turns(chat, problems, place)
            for number, (prompt, answer) in enumerate(turns, start=1):
                assert chat is not None
                places.append((index, place, number))
                prompts.append(prompt)
                answers.append(answer)
                identities.append(("", json.dumps(chat.turns, ensure_ascii=False)))
        encoded = self.template.encode_prompted(prompts, answers)
        for (index, place, number), row, identity in zip(places, encoded, identities, strict=True):
            for done in encoded_rows(row, identity, self.config, problems, place):
                yield index, done._replace(piece=number)

    def _turns(self, chat: Chat, problems: Problems, place: str) -> list[tuple[str, str]]:
        try:
            return [(self.template.chat_prompt(chat.turns[:at]), chat.turns[at]["content"]) for at in chat.answers]
        except UserError as error:
            problems.add(str(error), place)
            return []
