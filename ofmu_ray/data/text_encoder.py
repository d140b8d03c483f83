"""Documents as token ids: windows whose new tokens all have a loss."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ofmu_ray.config import FormatConfig
from ofmu_ray.data.answer_encoder import AnswerEncoder
from ofmu_ray.data.encoder import EncodedRow, Piece
from ofmu_ray.data.row_checks import Problems, document
from ofmu_ray.data.template import Template
from ofmu_ray.data.windows import TextLayout

_CODE = ("text_encoder.py", "windows.py")


class TextEncoder:
    """Encodes windows as `input_ids` (start token, context, new tokens) and `prompt_tokens`, those before the new ones.

    An EOS follows each document and has a loss. With `packed`, windows are cut from the documents of one batch of rows,
    joined by EOS.

    Raises:
        UserError: as `TextLayout`.
    """

    payload = AnswerEncoder.payload

    def __init__(self, template: Template, config: FormatConfig) -> None:
        self.template, self.config = template, config
        self.layout = TextLayout(template.tokenizer, config)

    @property
    def columns(self) -> Sequence[str]:
        return (self.config.text,)

    def fingerprint(self) -> str:
        code = [files("ofmu_ray.data").joinpath(name).read_text() for name in _CODE]
        options = [self.config.text, self.config.min_characters, self.config.stride, self.config.packed]
        return hashlib.sha256(json.dumps([self.template.fingerprint(), options, *code]).encode()).hexdigest()

    def encode(
        self, rows: Sequence[tuple[str, Mapping[str, Any]]], problems: Problems
    ) -> Iterator[tuple[int, EncodedRow]]:
        good = [
            (index, text)
            for index, (place, cells) in enumerate(rows)
            if (text := document(cells, self.config, problems, place)) is not None
        ]
        documents = [[*ids, self.layout.eos] for ids in self.layout.tokens([text for _, text in good])] if good else []
        if self.config.packed:
            yield from self._windows(good, documents)
        else:
            for one, tokens in zip(good, documents, strict=True):
                yield from self._windows([one], [tokens])

    def _windows(
        self, documents: Sequence[tuple[int, str]], tokens: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, EncodedRow]]:
        """The windows of documents, (index, text), joined."""
        stream = [token for ids in tokens for token in ids]
        ends = list(itertools.accumulate(map(len, tokens)))
        windows: Counter[int] = Counter()  # by document
        for start, new, stop in self.layout.cut(len(stream)):
            inside = range(bisect.bisect_right(ends, new), bisect.bisect_left(ends, stop) + 1)
            pieces = [Piece(("", documents[each][1]), windows[each] + 1) for each in inside]
            windows.update(inside)
            payload = [self.layout.begin, *stream[start:stop]], 1 + new - start
            index, _ = documents[inside[0]]
            yield (
                index,
                EncodedRow(payload, len(payload[0]), 0, pieces[0].identity, pieces[0].number, tuple(pieces[1:])),
            )
