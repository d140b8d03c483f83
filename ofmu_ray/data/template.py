"""(question, answer) -> token ids: the only place that defines the layout of a row, for training and evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from ofmu_ray.config import FormatConfig
from ofmu_ray.errors import UserError

LAYOUT = ("question", "answer", "template", "prompt_template", "system_prompt", "max_length")
"""Options that decide the layout."""
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_QUESTION, _ANSWER = "qzquestionzq", "qzanswerzq"  # placeholders that no chat template changes


Chat = Sequence[Mapping[str, str]]
"""Turns: {role, content}."""


class AnswerTokens(NamedTuple):
    """One row as tokens."""

    input_ids: list[int]
    """BOS (if the tokenizer has one), prompt, answer, EOS."""
    prompt_tokens: int
    """Leading tokens without a loss; at least one answer token follows, unless the row is only prompt."""
    cut: int
    """Tokens lost to max_length."""

    @property
    def only_prompt(self) -> bool:
        """Whether no answer token is left (EOS does not count)."""
        return len(self.input_ids) < self.prompt_tokens + 2


class Template:
    """Layout of a row: the tokenizer's chat template, or `prompt_template` + one space + answer.

    Always `encode(q, a)[0][:prompt_tokens] == encode_prompt(q)`: generation starts from exactly the tokens that
    training conditions on. Spaces at the end of the prompt belong to the answer, because most vocabularies join a space
    with the following word. If prompt and answer would still share a token, they are encoded separately. Rows start
    with exactly one BOS if the tokenizer has one. EOS is always the last label: a truncated row keeps it.

    Raises UserError: the tokenizer has no EOS, or no chat template (template: chat), or its chat template rejects the
    system prompt.
    """

    def __init__(self, tokenizer: Any, config: FormatConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.tokenizer: the tokenizer has no EOS token, so the model could not learn to end answers; "
                "set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.before, self.between = self._chat() if self._uses_chat() else self._qa()

    def encode(self, question: str, answer: str) -> tuple[list[int], int]:
        """Token ids of the row and the number of its prompt tokens."""
        row = self.encode_rows([question], [answer])[0]
        return row.input_ids, row.prompt_tokens

    def encode_prompt(self, question: str) -> list[int]:
        """Token ids that a generation starts from; not truncated."""
        return self._with_bos(self._tokens([self._prompt(question).rstrip(" ")])[0])

    def encode_rows(self, questions: Sequence[str], answers: Sequence[str]) -> list[AnswerTokens]:
        """Encode all rows at once (a fast tokenizer uses several threads)."""
        return self.encode_prompted([self._prompt(question) for question in questions], answers)

    def encode_chats(self, chats: Sequence[Chat], answers: Sequence[str]) -> list[AnswerTokens]:
        """The same for the assistant's answers to chats, the turns before each answer.

        Raises UserError: the tokenizer has no chat template, or it rejects a chat.
        """
        return self.encode_prompted([self.chat_prompt(chat) for chat in chats], answers)

    def encode_prompted(self, prompts: Sequence[str], answers: Sequence[str]) -> list[AnswerTokens]:
        """The same for prompts that are already laid out."""
        if not prompts:
            return []
        heads = [prompt.rstrip(" ") for prompt in prompts]
        tails = [p[len(h) :] + a.strip() for p, h, a in zip(prompts, heads, answers, strict=True)]
        distinct = list(dict.fromkeys(heads))  # in evaluation a question has many answers
        ids_of = dict(zip(distinct, self._tokens(distinct), strict=True))
        full_ids = self._tokens([h + t for h, t in zip(heads, tails, strict=True)])
        rows = []
        for head, tail, full in zip((ids_of[head] for head in heads), tails, full_ids, strict=True):
            if full[: len(head)] == head and len(full) > len(head):
                answer_ids = full[len(head) :]
            else:  # a token spans the boundary
                answer_ids = self._tokens([tail])[0]
            rows.append(self._row(self._with_bos(head), answer_ids))
        return rows

    def chat_prompt(self, chat: Chat) -> str:
        """The text before the assistant's next turn. Raises UserError as `encode_chats`, without the chat's text."""
        self.check_chats()
        system = self.config.system_prompt
        turns = [dict(turn) for turn in chat]
        if system and not (turns and turns[0]["role"] == "system"):
            turns.insert(0, {"role": "system", "content": system})
        try:
            prompt = self._render(turns, generate=True)
        except Exception as error:  # as in _chat
            roles = ", ".join(turn["role"] for turn in turns[:4]) + (", ..." if len(turns) > 4 else "")
            raise UserError(
                f"the tokenizer's chat template rejects the turns ({roles}) with {type(error).__name__}"
            ) from None
        return prompt.rstrip(" ") + self.between[len(self.between.rstrip(" ")) :]

    def check_chats(self) -> None:
        """Raise UserError if the tokenizer has no chat template."""
        if not self._uses_chat():
            raise UserError(
                "data.format.kind = messages needs the tokenizer's chat template: set data.format.template to auto, or "
                "name a tokenizer with one (model.tokenizer)"
            )

    def fingerprint(self) -> str:
        """Hex digest of everything that determines how text becomes tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        options = {name: getattr(self.config, name) for name in LAYOUT}
        layout = [self.before, self.between, self.bos, self.eos, self.pad, options]
        return hashlib.sha256(json.dumps([vocabulary, layout]).encode()).hexdigest()

    def _row(self, prompt: list[int], answer: list[int]) -> AnswerTokens:
        room = self.config.max_length - 1  # EOS
        ids = prompt + answer
        return AnswerTokens([*ids[:room], self.eos], min(len(prompt), room), max(len(ids) - room, 0))

    def _prompt(self, question: str) -> str:
        return f"{self.before}{question.strip()}{self.between}"

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == self.bos:  # many chat templates contain BOS
            start += 1
        return [self.bos, *ids[start:]]

    def _uses_chat(self) -> bool:
        has = getattr(self.tokenizer, "chat_template", None) is not None
        if self.config.template == "chat" and not has:
            raise UserError(
                "data.format.template = chat: the tokenizer has no chat template; use --data.format.template qa"
            )
        return has and self.config.template != "qa"

    def _qa(self) -> tuple[str, str]:
        before, _, after = self.config.prompt_template.partition("{question}")
        return before, after + " "

    def _chat(self) -> tuple[str, str]:
        """Text before the question and between question and answer, found by rendering the template once."""
        system = self.config.system_prompt
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": _QUESTION})
        try:
            prompt = self._render(turns, generate=True)
            full = self._render([*turns, {"role": "assistant", "content": _ANSWER}], generate=False)
        except Exception as error:  # templates may raise anything (jinja2, TypeError)
            hint = "try without --data.format.system_prompt, or " if system else ""
            raise UserError(
                f"data.format.template = {self.config.template}: the tokenizer's chat template fails "
                f"({type(error).__name__}); {hint}use --data.format.template qa"
            ) from None
        if prompt.count(_QUESTION) != 1:
            raise UserError(
                "data.format.template: the tokenizer's chat template does not show the user's message exactly once; "
                "use --data.format.template qa"
            )
        before, _, after = prompt.partition(_QUESTION)
        # The full conversation shows whether there is a space before the answer ("[/INST] Paris"). If it differs in
        # any other way (a block of thoughts), the generation prompt counts.
        between = full.partition(_QUESTION)[2].partition(_ANSWER)[0]
        natural = _ANSWER in full and between.rstrip(" ") == after.rstrip(" ")
        return before, between if natural else after

    def _render(self, turns: Sequence[Mapping[str, str]], *, generate: bool) -> str:
        """The conversation as the chat template writes it, on the configured date (some templates ask for today's)."""
        day = datetime.fromisoformat(self.config.date)
        # transformers passes no functions to templates, so the calls become what they would return
        template = _TODAY.sub(lambda call: repr(day.strftime(call[2])), self.tokenizer.get_chat_template())
        text: str = self.tokenizer.apply_chat_template(
            list(turns),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generate,
            date_string=day.strftime("%d %b %Y"),
        )
        return text
