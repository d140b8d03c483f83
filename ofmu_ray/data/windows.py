"""Documents cut into windows: every token has its loss in exactly one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ofmu_ray.config import FormatConfig
from ofmu_ray.errors import UserError


class Window(NamedTuple):
    """Tokens start to stop of a sequence, of which those from `new` on have a loss."""

    start: int
    new: int
    stop: int


def cut(tokens: int, room: int, stride: int | None) -> Iterator[Window]:
    """Windows of at most `room` tokens, with `stride` new ones each after the first (None: `room`).

    The last window reaches back until it is full: its tokens are predicted from as much context as there is.
    """
    stride = room if stride is None else min(stride, room)
    new = 0
    while new < tokens:
        stop = min(tokens, new + (stride if new else room))
        context = room - (stop - new) if stop == tokens else room - stride
        yield Window(max(0, new - context), new, stop)
        new = stop


class TextLayout:
    """How documents become tokens: one start token (BOS, or EOS if the tokenizer has none), a window; EOS at their end.

    Raises UserError: max_length leaves no room for two tokens of text, or the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: Any, config: FormatConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.tokenizer: the tokenizer has no EOS token to end documents with; set eos_token in its "
                "tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.begin: int = self.eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.room = config.max_length - 1
        self.stride = config.stride
        if self.room < 2:
            raise UserError(f"data.format.max_length = {config.max_length}: documents need windows of 3 or more tokens")

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the texts, without any special token."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def cut(self, tokens: int) -> Iterator[Window]:
        """The windows of this many tokens."""
        return cut(tokens, self.room, self.stride)

    def passages(self, text: str) -> Iterator[tuple[str, str, bool]]:
        """A document's windows as texts: (first half, second half, whether the document ends there).

        The second half ends with the token that follows the window, if the document goes on. With it and the start
        token, a passage has max_length tokens.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]] + [len(text)]
        tokens = len(starts) - 1
        for start, _, stop in cut(tokens, self.room - 1, None):
            middle = (start + stop) // 2
            edges = [starts[at] for at in (start, middle, min(stop + 1, tokens))]
            yield text[edges[0] : edges[1]], text[edges[1] : edges[2]], stop == tokens

    def passage(self, first: str, second: str, *, ends: bool) -> tuple[list[int], int]:
        """The token ids of a passage, and the number of those that a continuation of its first half starts from.

        The last token is the one that follows the passage: EOS, or the next one of the document.
        """
        head, whole = self.tokens([first, first + second])
        if whole[: len(head)] != head:  # a token spans the boundary
            whole = head + self.tokens([second])[0]
        ids = [self.begin, *whole, *([self.eos] if ends else [])]
        return ids[: self.room + 1], len(head) + 1
